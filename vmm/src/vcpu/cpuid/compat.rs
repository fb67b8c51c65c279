//! Whether a snapshot's guest can be shown on this host the processor it was frozen with.

use super::{
    SupportedCpuid,
    entries::{CpuidEntries, Register},
    features::{DYNAMIC, WORDS, Word},
};

/// Why a snapshot's CPUID does not fit a host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Incompatible {
    /// Another vendor's processor.
    #[error(
        "the snapshot was made on a {required} processor and this host has {host}; build the template here"
    )]
    Vendor {
        /// Vendor string of the snapshot.
        required: String,
        /// Vendor string of the host.
        host: String,
    },
    /// Features the guest was frozen with and this host cannot give.
    #[error(
        "this host lacks CPU features of the snapshot: {}; build the template here or with a portable cpu setting",
        .0.join(", ")
    )]
    MissingFeatures(Vec<String>),
    /// The guest may use more physical address bits than the host has.
    #[error(
        "the snapshot needs {required} physical address bits and this host has {host}; build the template here"
    )]
    PhysicalBits {
        /// Bits of the snapshot.
        required: u32,
        /// Bits of the host.
        host: u32,
    },
    /// A state component lies elsewhere in the save area, which guests keep in their memory.
    #[error(
        "state component {component} of XSAVE has another size or place on this host; build the template here"
    )]
    XsaveLayout {
        /// Number of the component.
        component: u32,
    },
}

/// Checks that all that `required` (one vCPU's CPUID from a snapshot) promises its guest can be had from `host`.
pub fn compatible(required: &CpuidEntries, host: &SupportedCpuid) -> Result<(), Incompatible> {
    let host = host.entries();
    let (wanted, found) = (vendor(required), vendor(host));
    if wanted != found {
        return Err(Incompatible::Vendor { required: wanted, host: found });
    }
    let missing: Vec<String> = WORDS.iter().flat_map(|word| missing_in(word, required, host)).collect();
    if !missing.is_empty() {
        return Err(Incompatible::MissingFeatures(missing));
    }
    let bits = |entries: &CpuidEntries| entries.get(0x8000_0008, 0).map_or(36, |leaf| leaf.eax & 0xFF);
    if bits(required) > bits(host) {
        return Err(Incompatible::PhysicalBits { required: bits(required), host: bits(host) });
    }
    let components = required.leaves().iter().filter(|leaf| leaf.function == 0xD && leaf.index >= 2);
    for leaf in components.filter(|leaf| leaf.eax != 0) {
        let same =
            host.get(0xD, leaf.index).is_some_and(|there| (there.eax, there.ebx) == (leaf.eax, leaf.ebx));
        if !same {
            return Err(Incompatible::XsaveLayout { component: leaf.index });
        }
    }
    Ok(())
}

/// Names of the bits of `word` that are required and not there.
fn missing_in(word: &Word, required: &CpuidEntries, host: &CpuidEntries) -> Vec<String> {
    let bits = |entries: &CpuidEntries| {
        entries.get(word.function, word.index).map_or(0, |leaf| leaf.register(word.register))
    };
    let missing = bits(required) & !bits(host);
    let unnamed =
        |bit| format!("CPUID {:#x}.{} {} bit {bit}", word.function, word.index, lower(word.register));
    (0..32)
        .filter(|bit| missing & 1 << bit != 0)
        .filter(|bit| !word.name(*bit).is_some_and(|name| DYNAMIC.contains(&name)))
        .map(|bit| word.name(bit).map_or_else(|| unnamed(bit), str::to_owned))
        .collect()
}

fn lower(register: Register) -> &'static str {
    match register {
        Register::Eax => "eax",
        Register::Ebx => "ebx",
        Register::Ecx => "ecx",
        Register::Edx => "edx",
    }
}

/// Vendor string of leaf 0, printable characters only.
pub fn vendor(entries: &CpuidEntries) -> String {
    let bytes = entries.get(0, 0).map(|leaf| [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes));
    let bytes = bytes.unwrap_or_default();
    bytes.as_flattened().iter().map(|b| if b.is_ascii_graphic() { *b as char } else { '?' }).collect()
}
