//! A machine: VM, vCPUs and devices as one value with a typed life cycle.
//!
//! Only a `Machine<Paused>` can be saved; only a `Machine<Running>` can be waited for. Guest memory outlives both.

mod build;
mod event_loop;
mod forkpoint;
mod restore;
mod run;
mod save;

use std::{io, sync::Arc};

pub use build::BootFiles;
pub use event_loop::{ConsoleReader, EventLoop, EventLoopSeed, RunningLoop, Source};
pub use forkpoint::Forkpoint;
pub use restore::{Offer, PreparedMachine, Steps};
pub use run::{Halt, Interrupter, Observer, Running};
pub use save::{About, MachineState};

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, Kvm};

use crate::{
    boot,
    devices::{self, Devices},
    memory::guest::GuestMemory,
    protocol::{Failure, FailureKind},
    snapshot,
    vcpu::{self, cpuid::SupportedCpuid},
    vm,
};

/// Stack of a machine's threads in bytes: far more than they use, and less than a huge page, which the kernel would give to
/// a stack that happens to be aligned to one, for 2 MiB and 4 ms a fork.
const STACK: usize = 512 << 10;

/// Why a machine could not be built, restored, run or saved.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM is not there or not permitted.
    #[error("cannot open /dev/kvm; is KVM enabled and is the user in group kvm?")]
    NoKvm(#[source] kvm_ioctls::Error),
    /// A query of KVM itself failed.
    #[error("KVM refused {call}")]
    Kvm {
        /// Name of the ioctl.
        call: &'static str,
        /// The kernel's answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Guest memory could not be mapped.
    #[error("cannot map {bytes} bytes of guest memory")]
    Map {
        /// How much.
        bytes: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Guest memory could not be compared with the image, or made equal to it again.
    #[error("cannot rewind or trim guest memory")]
    Rewind(#[source] io::Error),
    /// Guest memory could not be accessed where it must exist.
    #[error("guest memory is not accessible")]
    Memory(#[source] vm_memory::GuestMemoryError),
    /// The mailbox does not fit.
    #[error("mailbox of {0} bytes is too large; shorten the environment")]
    MailboxTooLarge(usize),
    /// A thread could not be started.
    #[error("cannot start a thread; raise the process limit")]
    Thread(#[source] io::Error),
    /// The event loop could not be set up.
    #[error("cannot set up the event loop")]
    EventLoop(#[source] io::Error),
    /// A state that no machine of ours has.
    #[error("saved machine has {0}; rebuild the template")]
    BadState(&'static str),
    /// The snapshot was made for CPU features this host lacks.
    #[error(transparent)]
    Cpu(#[from] vcpu::cpuid::Incompatible),
    /// Kernel, initramfs or null guest could not be loaded.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// The null guest's program cannot be read.
    #[error("cannot read the null guest's program")]
    ReadProgram(#[source] io::Error),
    /// The null guest's program is empty or too long.
    #[error("the null guest's program has {0} bytes; it must have 1 to {max}", max = boot::null::MAX_PROGRAM)]
    BadProgram(usize),
    /// A device refused.
    #[error(transparent)]
    Device(#[from] devices::Error),
    /// The VM refused.
    #[error(transparent)]
    Vm(#[from] vm::Error),
    /// A vCPU refused.
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
    /// The snapshot could not be read or written.
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
}

impl Error {
    /// The error as it crosses a process boundary: one line with all causes.
    pub fn failure(&self) -> Failure {
        let kind = match self {
            Self::Boot(_) | Self::MailboxTooLarge(_) | Self::BadProgram(_) => FailureKind::Request,
            Self::BadState(_) | Self::Cpu(_) | Self::Snapshot(_) => FailureKind::Snapshot,
            Self::Vcpu(vcpu::Error::MsrRejected { .. } | vcpu::Error::BadState { .. }) => {
                FailureKind::Snapshot
            }
            _ => FailureKind::Host,
        };
        Failure { kind, message: one_line(self) }
    }
}

/// An error and its causes on one line.
pub fn one_line(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}

/// What this host's KVM can give to guests.
pub(crate) fn supported_cpuid(kvm: &Kvm) -> Result<SupportedCpuid, Error> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|source| Error::Kvm { call: "KVM_GET_SUPPORTED_CPUID", source })?;
    Ok(SupportedCpuid::new(&supported, kvm.check_extension(Cap::TscDeadlineTimer)))
}

/// A machine in state `S`: [`Paused`] or [`Running`].
pub struct Machine<S> {
    core: Core,
    state: S,
}

/// What a machine keeps in every state.
struct Core {
    vm: vm::Vm,
    memory: GuestMemory,
    devices: Arc<Devices>,
}

/// The state of a machine whose vCPUs stand still.
pub struct Paused {
    vcpus: Vec<vcpu::Vcpu>,
}

impl<S> Machine<S> {
    /// The devices, for the event loop.
    pub fn devices(&self) -> &Arc<Devices> {
        &self.core.devices
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.core.memory
    }
}
