//! KVM ioctls that kvm-ioctls marks unsafe.

use kvm_bindings::{
    KVM_MEM_READONLY, KVMIO, Xsave, kvm_pre_fault_memory, kvm_userspace_memory_region, kvm_xsave, kvm_xsave2,
};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::ioctl::opcode;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

use super::mapping::Mapping;

/// Gives the guest the piece `[offset, offset + len)` of `mapping` at `gpa` as memslot `slot`.
///
/// # Panics
/// When the piece is not inside the mapping.
pub fn add_memory(
    vm: &VmFd,
    slot: u32,
    gpa: u64,
    mapping: &Mapping,
    offset: u64,
    len: u64,
    read_only: bool,
) -> Result<(), kvm_ioctls::Error> {
    assert!(
        offset.checked_add(len).is_some_and(|end| end <= mapping.len() as u64),
        "piece outside of the mapping"
    );
    let region = kvm_userspace_memory_region {
        slot,
        flags: if read_only { KVM_MEM_READONLY } else { 0 },
        guest_phys_addr: gpa,
        memory_size: len,
        userspace_addr: mapping.address() + offset,
    };
    // SAFETY: the range lies in a mapping (asserted above) that is never unmapped, and Rust holds no reference into it.
    unsafe { vm.set_user_memory_region(region) }
}

/// KVM_PRE_FAULT_MEMORY of linux/kvm.h.
const PRE_FAULT: u64 = opcode::read_write::<kvm_pre_fault_memory>(KVMIO as u8, 0xD5) as u64;

/// Fills the VM's second-stage page tables for `[gpa, gpa + size)`, whole pages, as if the vCPU had read there; nothing is copied
/// on write for it. Only where KVM_CAP_PRE_FAULT_MEMORY is (Linux 6.11, with EPT or NPT).
///
/// # Errors
/// ENOTTY or EINVAL on a kernel without it, ENOENT where the guest has no memory, EOPNOTSUPP for page tables that are shadows,
/// EFAULT and ENOMEM as for a guest's own access. Pages before the one that failed are in the tables.
pub fn pre_fault(vcpu: &VcpuFd, gpa: u64, size: u64) -> Result<(), kvm_ioctls::Error> {
    let mut rest = kvm_pre_fault_memory { gpa, size, ..Default::default() };
    while rest.size > 0 {
        let before = rest.size;
        // SAFETY: the kernel reads and writes this structure of linux/kvm.h only, and maps what a memslot of the VM holds.
        if unsafe { ioctl_with_mut_ref(vcpu, PRE_FAULT, &mut rest) } != 0 {
            match kvm_ioctls::Error::last() {
                error if error.errno() == libc::EINTR => continue,
                error => return Err(error),
            }
        }
        // It says how far it came; whoever makes no way would be asked for ever.
        if rest.size >= before {
            return Err(kvm_ioctls::Error::new(libc::EIO));
        }
    }
    Ok(())
}

/// A vCPU's extended state (x87, SSE, AVX ...) in a buffer of the size that its VM wants.
pub struct XsaveArea(Xsave);

impl XsaveArea {
    /// An empty area; `size` is KVM_CAP_XSAVE2's answer for the VM in bytes (0 on kernels without it).
    fn zeroed(size: usize) -> Self {
        let extra = size.saturating_sub(size_of::<kvm_xsave>()).div_ceil(4);
        Self(Xsave::new(extra).expect("a few KiB"))
    }

    /// Reads the area from a vCPU.
    pub fn get(vcpu: &VcpuFd, size: usize) -> Result<Self, kvm_ioctls::Error> {
        let mut area = Self::zeroed(size);
        // SAFETY: the buffer has at least the size that KVM reported for this VM.
        unsafe { vcpu.get_xsave2(&mut area.0)? };
        Ok(area)
    }

    /// Writes the area to a vCPU of a VM whose KVM_CAP_XSAVE2 answer is not larger than this area's size.
    pub fn set(&self, vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        // SAFETY: `from_bytes` and `get` made the buffer as large as KVM reported for this host.
        unsafe { vcpu.set_xsave2(&self.0) }
    }

    /// The area as bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let fixed = self.0.as_fam_struct_ref().xsave.region.iter();
        fixed.chain(self.0.as_slice()).flat_map(|word| word.to_le_bytes()).collect()
    }

    /// The area from saved bytes, for a VM that wants `size` bytes; `None` if they are too few, too many or odd.
    pub fn from_bytes(size: usize, bytes: &[u8]) -> Option<Self> {
        let mut area = Self::zeroed(size);
        let fixed_words = size_of::<kvm_xsave>() / 4;
        if !bytes.len().is_multiple_of(4) || bytes.len() / 4 < fixed_words {
            return None;
        }
        let words: Vec<u32> =
            bytes.chunks_exact(4).map(|c| u32::from_le_bytes(c.try_into().expect("four"))).collect();
        let (fixed, extra) = words.split_at(fixed_words);
        // SAFETY: only the fixed part is written; the length field keeps the length given to `new`.
        let header: &mut kvm_xsave2 = unsafe { area.0.as_mut_fam_struct() };
        header.xsave.region.copy_from_slice(fixed);
        area.0.as_mut_slice().get_mut(..extra.len())?.copy_from_slice(extra);
        Some(area)
    }
}

#[cfg(test)]
mod tests;
