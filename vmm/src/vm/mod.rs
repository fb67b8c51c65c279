//! The KVM virtual machine in the one cheap order.

mod state;

pub use state::{ClockState, VmState};

use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    memory::{guest::GuestMemory, layout},
    sys::{self, mapping::Mapping},
};

/// Why a VM could not be made, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A KVM call failed.
    #[error("KVM refused {call}")]
    Kvm {
        /// Name of the ioctl.
        call: &'static str,
        /// The kernel's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// Makes an [`Error::Kvm`] of a failed call.
fn kvm(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |source| Error::Kvm { call, source }
}

/// A VM with memory and interrupt controllers.
pub struct Vm {
    fd: VmFd,
    xsave_size: usize,
}

impl Vm {
    /// Makes the VM, its memslots and its interrupt controllers, ready for vCPUs.
    ///
    /// `root` is mapped read-only at [`layout::PMEM_BASE`].
    ///
    /// # Errors
    /// [`Error::Kvm`] with ENOMEM, EMFILE or EEXIST as the kernel says.
    pub fn new(kvm_device: &Kvm, memory: &GuestMemory, root: Option<&Mapping>) -> Result<Self, Error> {
        let fd = create_vm(kvm_device)?;
        // Before the first memslot: on Intel hosts it decides where KVM puts its own three pages.
        fd.set_tss_address(layout::KVM_TSS as usize).map_err(kvm("KVM_SET_TSS_ADDR"))?;
        // Before the interrupt controllers: they register on an I/O bus, after which the next memslot waits for a
        // grace period, 6 to 8 ms on Linux 6.18 (commit 7d9a0273c459).
        add_memory(&fd, memory, root)?;
        // Before the vCPUs: the kernel refuses an interrupt controller when a vCPU exists.
        fd.create_irq_chip().map_err(kvm("KVM_CREATE_IRQCHIP"))?;
        let xsave_size = usize::try_from(fd.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(Self { fd, xsave_size })
    }

    /// Makes vCPU `id`.
    pub fn create_vcpu(&self, id: u8) -> Result<VcpuFd, Error> {
        self.fd.create_vcpu(u64::from(id)).map_err(kvm("KVM_CREATE_VCPU"))
    }

    /// Size in bytes of a vCPU's extended state; 0 where the kernel predates KVM_CAP_XSAVE2 (4096 then).
    pub fn xsave_size(&self) -> usize {
        self.xsave_size
    }

    /// Raises `gsi` whenever `event` is written.
    ///
    /// Last of all set-up: like an ioeventfd it registers on what [`Vm::new`] built.
    pub fn connect_interrupt(&self, event: &EventFd, gsi: u32) -> Result<(), Error> {
        self.fd.register_irqfd(event, gsi).map_err(kvm("KVM_IRQFD"))
    }

    /// Signals `event` when the guest writes any 32-bit value to `gpa`, without leaving the kernel.
    pub fn connect_kick(&self, event: &EventFd, gpa: u64) -> Result<(), Error> {
        let address = kvm_ioctls::IoEventAddress::Mmio(gpa);
        self.fd.register_ioevent(event, &address, kvm_ioctls::NoDatamatch).map_err(kvm("KVM_IOEVENTFD"))
    }
}

fn create_vm(kvm_device: &Kvm) -> Result<VmFd, Error> {
    const ATTEMPTS: u32 = 5;
    let mut attempt = 1;
    loop {
        match kvm_device.create_vm() {
            // A signal in the middle is not a failure (Firecracker issue 5046).
            Err(error) if error.errno() == libc::EINTR && attempt < ATTEMPTS => attempt += 1,
            result => return result.map_err(kvm("KVM_CREATE_VM")),
        }
    }
}

fn add_memory(fd: &VmFd, memory: &GuestMemory, root: Option<&Mapping>) -> Result<(), Error> {
    let mut slot = 0;
    for region in memory.regions() {
        sys::kvm::add_memory(fd, slot, region.gpa, memory.mapping(), region.offset, region.len, false)
            .map_err(kvm("KVM_SET_USER_MEMORY_REGION"))?;
        slot += 1;
    }
    if let Some(root) = root {
        sys::kvm::add_memory(fd, slot, layout::PMEM_BASE, root, 0, root.len() as u64, true)
            .map_err(kvm("KVM_SET_USER_MEMORY_REGION of the root image"))?;
    }
    Ok(())
}
