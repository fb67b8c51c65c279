//! What the guest sees by the CPUID instruction, and whether a snapshot's guest may see it on another host.
//!
//! A guest's CPUID is what KVM supports, less what a snapshot cannot carry ([`features`]), less what the template's
//! portability level leaves out, with the topology of its own vCPUs. It is made once, when a template is built; a fork
//! gets the snapshot's, after [`compatible`] found that this host can give it.
//!
//! Sources: Intel SDM vol. 2A (CPUID) and vol. 1 chapter 13 (XSAVE), AMD APM vol. 3 appendix E,
//! Linux Documentation/virt/kvm/x86/cpuid.rst.

mod compat;
mod entries;
pub mod features;
mod topology;
mod xsave;

pub use compat::{Incompatible, compatible, vendor};
pub use entries::{CpuidEntries, Leaf, MalformedLeaf, Register};

use kvm_bindings::CpuId;

use crate::{protocol::CpuTemplate, sys};

/// Last basic leaf a guest sees; beyond are tracing, enclaves, matrices and other state snapshots do not carry.
const LAST_BASIC: u32 = 0xD;

/// Last leaf of KVM's own range a guest sees.
const LAST_KVM: u32 = 0x4000_0001;

/// Last extended leaf of a portable guest; later ones differ from one processor to the next.
const LAST_EXTENDED_PORTABLE: u32 = 0x8000_0008;

/// Last extended leaf of a guest that sees the host's processor.
const LAST_EXTENDED_HOST: u32 = 0x8000_0021;

/// Physical address bits of a portable guest: enough for the address map, and what the narrowest processors have.
const PHYSICAL_BITS_PORTABLE: u32 = 39;

/// Linear address bits of a guest: four-level page tables.
const LINEAR_BITS: u32 = 48;

/// What this host's KVM can give to guests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SupportedCpuid(CpuidEntries);

impl SupportedCpuid {
    /// From KVM_GET_SUPPORTED_CPUID. `tsc_deadline` is whether KVM_CAP_TSC_DEADLINE_TIMER is there: older kernels do
    /// not put the feature's bit into the list.
    pub fn new(supported: &CpuId, tsc_deadline: bool) -> Self {
        let mut supported = Self::granted(CpuidEntries::from(supported), tsc_deadline);
        if sys::cpu::host_is_emulated() {
            // QEMU does not let KVM see a guest's XSETBV, so that KVM takes the guest's XCR0 away at the next entry.
            xsave::remove(&mut supported.0);
        }
        supported
    }

    fn granted(mut entries: CpuidEntries, tsc_deadline: bool) -> Self {
        let mut granted = vec!["hypervisor", "x2apic"];
        if tsc_deadline {
            granted.push("tsc_deadline_timer");
        }
        for feature in granted {
            features::set(&mut entries, feature);
        }
        Self(entries)
    }

    /// The entries, as KVM gave them but for the bits granted by capabilities.
    pub fn entries(&self) -> &CpuidEntries {
        &self.0
    }

    /// Whether a feature, by its Linux name, can be given to guests.
    ///
    /// # Panics
    /// If no feature has this name.
    pub fn has(&self, feature: &str) -> bool {
        features::has(&self.0, feature)
    }
}

/// The CPUID of vCPU number `index` of `vcpus` in a new guest.
///
/// Templates are upper bounds: what the host lacks of them, the guest lacks too.
pub fn guest(supported: &SupportedCpuid, template: CpuTemplate, index: u8, vcpus: u8) -> CpuidEntries {
    assert!(index < vcpus && vcpus <= crate::memory::layout::MAX_VCPUS, "the number of vCPUs was checked");
    let mut entries = supported.0.clone();
    let last_extended = match template {
        CpuTemplate::Host => LAST_EXTENDED_HOST,
        CpuTemplate::X86_64V2 | CpuTemplate::X86_64V3 => LAST_EXTENDED_PORTABLE,
    };
    entries.retain(|leaf| keeps(leaf.function, last_extended));
    features::apply(&mut entries, template);
    for (first, last) in [(0, LAST_BASIC), (0x4000_0000, LAST_KVM), (0x8000_0000, last_extended)] {
        if let Some(leaf) = entries.get_mut(first, 0) {
            leaf.eax = leaf.eax.min(last);
        }
    }
    address_widths(&mut entries, template);
    xsave::apply(&mut entries);
    topology::apply(&mut entries, index, vcpus);
    // KVM answers zeros to what is not listed.
    entries.retain(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx] != [0; 4]);
    entries
}

/// Whether a leaf is one that guests see at all.
fn keeps(function: u32, last_extended: u32) -> bool {
    match function {
        // 5: MONITOR, 9: direct cache access, 0xA: performance counters; none is offered.
        0..=LAST_BASIC => !matches!(function, 5 | 9 | 0xA),
        0x4000_0000..=LAST_KVM => true,
        // 0xA: nested virtualisation, 0x1B: sampling, 0x1C: profiling, 0x1F: memory encryption, 0x20: quality of service.
        0x8000_0000.. => {
            function <= last_extended && !matches!(function & 0xFFFF, 0xA | 0x1B | 0x1C | 0x1F | 0x20)
        }
        _ => false,
    }
}

/// Narrows the address widths of leaf 0x80000008: no five-level paging, and in portable guests no more physical bits
/// than all hosts have.
fn address_widths(entries: &mut CpuidEntries, template: CpuTemplate) {
    let Some(leaf) = entries.get_mut(0x8000_0008, 0) else { return };
    let physical = match template {
        CpuTemplate::Host => leaf.eax & 0xFF,
        CpuTemplate::X86_64V2 | CpuTemplate::X86_64V3 => (leaf.eax & 0xFF).min(PHYSICAL_BITS_PORTABLE),
    };
    let linear = ((leaf.eax >> 8) & 0xFF).min(LINEAR_BITS);
    leaf.eax = (linear << 8) | physical;
}

#[cfg(test)]
mod tests;
