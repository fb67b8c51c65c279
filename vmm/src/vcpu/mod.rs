//! One virtual CPU: its state, its CPUID, and one exit at a time.

pub mod cpuid;
mod lapic;
mod paging;
mod run;
mod state;

pub use run::{Hypercall, Stop};
pub(crate) use state::time_stamp;
pub use state::{PreparedVcpu, VcpuState};

use std::sync::Arc;

use cpuid::CpuidEntries;
use kvm_bindings::{CpuId, Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_sregs};
use kvm_ioctls::{Kvm, SyncReg, VcpuFd};

use crate::{
    memory::GuestRam,
    sys,
    vm::{self, Vm},
};

/// Why a vCPU could not be made, saved, restored or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A KVM call failed.
    #[error("KVM refused {call} on vCPU {vcpu}")]
    Kvm {
        /// Name of the ioctl.
        call: &'static str,
        /// Index of the vCPU.
        vcpu: u8,
        /// The kernel's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The VM refused.
    #[error(transparent)]
    Vm(#[from] vm::Error),
    /// KVM rejected a model-specific register of the snapshot.
    #[error("KVM rejected MSR {msr:#x} of the snapshot; fork it on a host like the one it was made on")]
    MsrRejected {
        /// Index of the register.
        msr: u32,
    },
    /// A saved field cannot be right.
    #[error("saved vCPU {vcpu} has a malformed {field}; rebuild the template")]
    BadState {
        /// Index of the vCPU.
        vcpu: u8,
        /// Which field.
        field: &'static str,
    },
}

/// A vCPU that is not running.
pub struct Vcpu {
    fd: VcpuFd,
    id: u8,
    xsave_size: usize,
    cpuid: Arc<CpuidEntries>,
    /// Whether the guest's time-stamp counter runs at the host's rate.
    same_rate: bool,
    /// Its timer, while that stands still.
    timer: Option<state::StoppedTimer>,
}

impl Vcpu {
    /// Makes vCPU `id` of `vm`, which sees `cpuid`.
    pub fn new(vm: &Vm, id: u8, cpuid: CpuidEntries) -> Result<Self, Error> {
        let entries = cpuid.to_kvm().map_err(|_| Error::BadState { vcpu: id, field: "cpuid" })?;
        Self::with_cpuid(vm, id, Arc::new(cpuid), &entries)
    }

    fn with_cpuid(vm: &Vm, id: u8, cpuid: Arc<CpuidEntries>, entries: &CpuId) -> Result<Self, Error> {
        let fd = vm.create_vcpu(id)?;
        let mut vcpu = Self { fd, id, xsave_size: vm.xsave_size(), cpuid, same_rate: true, timer: None };
        // Before everything else: MSRs and extended state are checked against it.
        vcpu.fd.set_cpuid2(entries).map_err(vcpu.kvm("KVM_SET_CPUID2"))?;
        // Hypercalls carry their arguments in registers; this spares an ioctl for each.
        vcpu.fd.set_sync_valid_reg(SyncReg::Register);
        Ok(vcpu)
    }

    /// Index of the vCPU.
    pub fn id(&self) -> u8 {
        self.id
    }

    /// Sets the registers at which a template begins; `mode` changes the system registers from their reset values.
    pub fn set_entry(&self, regs: &kvm_regs, mode: impl FnOnce(&mut kvm_sregs)) -> Result<(), Error> {
        let mut sregs = self.fd.get_sregs().map_err(self.kvm("KVM_GET_SREGS"))?;
        mode(&mut sregs);
        self.fd.set_sregs(&sregs).map_err(self.kvm("KVM_SET_SREGS"))?;
        self.fd.set_regs(regs).map_err(self.kvm("KVM_SET_REGS"))
    }

    /// Sets what a kernel expects of a processor that firmware has prepared.
    pub fn set_boot_values(&self, fpu: &kvm_fpu, msrs: &[kvm_msr_entry]) -> Result<(), Error> {
        self.fd.set_fpu(fpu).map_err(self.kvm("KVM_SET_FPU"))?;
        self.set_msrs(&Msrs::from_entries(msrs).expect("a few entries"))
    }

    /// The descriptor, to make its thread kickable.
    pub(crate) fn fd_mut(&mut self) -> &mut VcpuFd {
        &mut self.fd
    }

    /// Guest-physical address that the vCPU's page tables give for `gva`, or `None` if it is not mapped.
    pub fn translate(&self, ram: &GuestRam, gva: u64) -> Result<Option<u64>, Error> {
        let sregs = self.fd.get_sregs().map_err(self.kvm("KVM_GET_SREGS"))?;
        Ok(paging::translate(ram, sregs.cr3, gva))
    }

    /// Fills the second-stage page tables for reads of `[gpa, gpa + size)`, where KVM_CAP_PRE_FAULT_MEMORY is.
    ///
    /// # Errors
    /// [`Error::Kvm`]; the guest's own faults come to the same.
    pub fn pre_fault(&self, gpa: u64, size: u64) -> Result<(), Error> {
        sys::kvm::pre_fault(&self.fd, gpa, size).map_err(self.kvm("KVM_PRE_FAULT_MEMORY"))
    }

    fn kvm(&self, call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error + use<> {
        let vcpu = self.id;
        move |source| Error::Kvm { call, vcpu, source }
    }
}

/// Indices of the MSRs that KVM of this host saves and restores.
pub fn msr_list(kvm: &Kvm) -> Result<Vec<u32>, kvm_ioctls::Error> {
    Ok(kvm.get_msr_index_list()?.as_slice().to_vec())
}
