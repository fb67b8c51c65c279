//! Running a vCPU until something happens that the machine must know.

use forkling_proto::hypercall;
use kvm_ioctls::VcpuExit;

use super::{Error, Vcpu};
use crate::{
    devices::{Devices, Effect},
    protocol::StopReason,
};

/// Why a vCPU stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The agent made a hypercall; the `out` is not completed yet.
    Hypercall(Hypercall),
    /// Somebody kicked the vCPU.
    Kicked,
    /// The guest ended or cannot go on.
    Ended(StopReason),
}

/// A hypercall as the guest made it: three numbers to distrust.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hypercall {
    /// `eax`: the call.
    pub call: u32,
    /// `rbx`: first argument.
    pub first: u64,
    /// `rcx`: second argument.
    pub second: u64,
}

impl Vcpu {
    /// Runs until a [`Stop`]; register accesses of devices are handled on the way.
    pub fn run(&mut self, devices: &Devices) -> Result<Stop, Error> {
        loop {
            let exit = match self.fd.run() {
                Ok(exit) => exit,
                Err(error) => match error.errno() {
                    libc::EINTR => {
                        self.fd.set_kvm_immediate_exit(0);
                        return Ok(Stop::Kicked);
                    }
                    // EAGAIN: an AP that waits for its start-up interrupt. ENOMEM: the first run on a loaded host
                    // before Linux commit 916b7f4; the next one finds memory.
                    libc::EAGAIN | libc::ENOMEM => continue,
                    _ => return Err(self.kvm("KVM_RUN")(error)),
                },
            };
            if let Some(stop) = handle(exit, devices) {
                return Ok(match stop {
                    Stop::Hypercall(partial) => Stop::Hypercall(self.with_arguments(partial)),
                    other => other,
                });
            }
        }
    }

    /// Lets KVM finish the instruction of the last exit without running the guest. Before that, the instruction
    /// pointer still stands on it (Documentation/virt/kvm/api.rst, KVM_EXIT_IO).
    pub fn complete_exit(&mut self) -> Result<(), Error> {
        self.fd.set_kvm_immediate_exit(1);
        let result = match self.fd.run() {
            Ok(_) => Ok(()),
            Err(error) if error.errno() == libc::EINTR => Ok(()),
            Err(error) => Err(self.kvm("KVM_RUN to complete an exit")(error)),
        };
        self.fd.set_kvm_immediate_exit(0);
        result
    }

    fn with_arguments(&self, partial: Hypercall) -> Hypercall {
        let regs = self.fd.sync_regs().regs;
        Hypercall { first: regs.rbx, second: regs.rcx, ..partial }
    }
}

/// Handles one exit; `None` to run on.
fn handle(exit: VcpuExit<'_>, devices: &Devices) -> Option<Stop> {
    match exit {
        VcpuExit::IoOut(hypercall::PORT, data) => {
            let call = <[u8; 4]>::try_from(data).map(u32::from_le_bytes).unwrap_or(0);
            return Some(Stop::Hypercall(Hypercall { call, first: 0, second: 0 }));
        }
        VcpuExit::IoOut(port, data) => {
            if devices.pio_write(port, data) == Effect::Reset {
                return Some(Stop::Ended(StopReason::Reset));
            }
        }
        VcpuExit::IoIn(port, data) => devices.pio_read(port, data),
        VcpuExit::MmioRead(address, data) => devices.mmio_read(address, data),
        VcpuExit::MmioWrite(address, data) => devices.mmio_write(address, data),
        VcpuExit::Shutdown => return Some(Stop::Ended(StopReason::TripleFault)),
        VcpuExit::Hlt | VcpuExit::SystemEvent(..) => return Some(Stop::Ended(StopReason::Reset)),
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
        other => return Some(Stop::Ended(StopReason::KvmError(format!("unexpected exit {other:?}")))),
    }
    None
}
