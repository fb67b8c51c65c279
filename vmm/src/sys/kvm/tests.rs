use kvm_bindings::KVM_CAP_PRE_FAULT_MEMORY;
use kvm_ioctls::Kvm;

use super::{PRE_FAULT, add_memory, kvm_pre_fault_memory, pre_fault};
use crate::sys::mapping::Mapping;

#[test]
fn the_request_is_the_kernels() {
    // _IOWR(0xAE, 0xd5, struct kvm_pre_fault_memory { u64 gpa, size, flags, padding[5]; }) of linux/kvm.h 6.11.
    assert_eq!(PRE_FAULT, 0xC040_AED5);
    assert_eq!(size_of::<kvm_pre_fault_memory>(), 64);
    let offset = std::mem::offset_of!(kvm_pre_fault_memory, size);
    assert_eq!((offset, std::mem::offset_of!(kvm_pre_fault_memory, flags)), (8, 16));
}

/// A host with it fills the tables and refuses what is no memory; one without says so, and nothing has happened.
#[test]
fn a_host_says_whether_it_can() {
    let kvm = Kvm::new().unwrap();
    let can = kvm.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into()) > 0;
    let vm = kvm.create_vm().unwrap();
    let memory = Mapping::anonymous(16 * 4096).unwrap();
    add_memory(&vm, 0, 0, &memory, 0, 16 * 4096, false).unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let errno = |gpa, size| pre_fault(&vcpu, gpa, size).map_err(|error| error.errno());
    if can {
        assert_eq!((errno(0, 16 * 4096), errno(4096, 0)), (Ok(()), Ok(())));
        assert_eq!(errno(1 << 30, 4096), Err(libc::ENOENT));
    } else {
        let error = errno(0, 4096).unwrap_err();
        assert!([libc::ENOTTY, libc::EINVAL, libc::EOPNOTSUPP].contains(&error), "{error}");
    }
}
