//! Restoring a machine from a snapshot: what is done once per template, and what once per fork.

use std::{fs::File, ops::Range, os::fd::OwnedFd, sync::Arc, time::Duration};

use kvm_ioctls::{Cap, Kvm};

use super::{Core, Error, EventLoopSeed, Forkpoint, Machine, MachineState, Paused};
use crate::{
    devices::{DeviceStates, Devices},
    memory::{
        guest::{GuestMemory, Trimmed},
        layout,
    },
    protocol::PageRun,
    sys::mapping::Mapping,
    vcpu::{
        self, PreparedVcpu, Vcpu, VcpuState,
        cpuid::{self, SupportedCpuid},
    },
    vm::{self, ClockState, Vm, VmState},
};

/// What this host's KVM gives to guests; asked for once.
pub struct Offer {
    cpuid: SupportedCpuid,
    xsave_size: usize,
    can_pre_fault: bool,
}

impl Offer {
    /// Asks KVM.
    pub fn of(kvm: &Kvm) -> Result<Self, Error> {
        let cpuid = super::supported_cpuid(kvm)?;
        let xsave_size = usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let can_pre_fault = kvm.check_extension_raw(kvm_bindings::KVM_CAP_PRE_FAULT_MEMORY.into()) > 0;
        Ok(Self { cpuid, xsave_size, can_pre_fault })
    }
}

/// A snapshot's machine, validated against this host and in the form in which KVM takes it.
pub struct PreparedMachine {
    forkpoint: Forkpoint,
    vm: VmState,
    vcpus: Vec<PreparedVcpu>,
    devices: DeviceStates,
    /// Whether anybody reads the clock that [`Vm::set_clock`] sets.
    kvmclock: bool,
    /// Whether the host has KVM_PRE_FAULT_MEMORY.
    can_pre_fault: bool,
}

impl PreparedMachine {
    /// Validates untrusted state; `ram` is the guest's memory, for range checks only.
    ///
    /// # Errors
    /// [`Error::Cpu`] when this host lacks a feature the guest saw, [`Error::BadState`] when the state is impossible.
    pub fn new(state: MachineState, offer: &Offer, memory: &GuestMemory) -> Result<Self, Error> {
        let MachineState { forkpoint, vm, vcpus, devices } = state;
        if vcpus.is_empty() || vcpus.len() > usize::from(layout::MAX_VCPUS) {
            return Err(Error::BadState("no vCPU or too many"));
        }
        if usize::from(forkpoint.vcpu) >= vcpus.len() || !forkpoint.fits(memory.ram()) {
            return Err(Error::BadState("an impossible forkpoint"));
        }
        let &Offer { cpuid: ref supported, xsave_size, can_pre_fault } = offer;
        for vcpu in &vcpus {
            cpuid::compatible(vcpu.cpuid(), supported)?;
        }
        let kvmclock = vcpus.iter().any(VcpuState::uses_kvmclock);
        let vcpus = vcpus
            .into_iter()
            .zip(0..)
            .map(|(vcpu, id)| vcpu.prepare(id, xsave_size))
            .collect::<Result<_, _>>()?;
        Ok(Self { forkpoint, vm, vcpus, devices, kvmclock, can_pre_fault })
    }

    /// Whether it has a NIC.
    pub fn has_nic(&self) -> bool {
        self.devices.net.is_some()
    }

    /// Where forks of this machine stand.
    pub fn forkpoint(&self) -> &Forkpoint {
        &self.forkpoint
    }

    /// Sets the clocks back to the freeze, or to where they `stood` since, and has timers run on from there. At activation,
    /// since a parked fork may have waited for minutes. Timers do not fire before `quiet` has passed.
    pub fn restart_clocks(
        &self,
        machine: &mut Machine<Paused>,
        stood: Option<&ClockState>,
        quiet: Duration,
        advance_monotonic: bool,
    ) -> Result<(), Error> {
        for (vcpu, prepared) in machine.state.vcpus.iter_mut().zip(&self.vcpus) {
            vcpu.restart_clock(prepared, quiet, advance_monotonic)?;
        }
        if self.kvmclock {
            machine.core.vm.set_clock(stood.unwrap_or(&self.vm.clock), advance_monotonic)?;
        }
        Ok(())
    }
}

impl PreparedMachine {
    /// Has the clocks of a machine that has run since its restore stand still until [`PreparedMachine::restart_clocks`]. Its
    /// timers wait in it; where the guest's own clock stood, if it uses that, is told.
    pub fn stop_clocks(&self, machine: &mut Machine<Paused>) -> Result<Option<ClockState>, Error> {
        // Before the clock: what lies between the two makes timers late, never early.
        machine.state.vcpus.iter_mut().try_for_each(Vcpu::stop_timer)?;
        self.kvmclock.then(|| machine.core.vm.clock().map_err(Error::from)).transpose()
    }
}

/// Told of each step of a restore, for the timings in a fork's reply.
pub struct Steps<'a> {
    /// The VM has its memory and interrupt controllers.
    pub vm: &'a mut dyn FnMut(),
    /// The vCPUs exist and are restored.
    pub vcpus: &'a mut dyn FnMut(),
}

impl Machine<Paused> {
    /// Builds a machine in the prepared state over `memory`. Clocks stand until [`PreparedMachine::restart_clocks`].
    pub fn restore(
        kvm: &Kvm,
        prepared: &PreparedMachine,
        memory: GuestMemory,
        root: Option<&Mapping>,
        frames: Option<OwnedFd>,
        event_loop: &EventLoopSeed,
        steps: Steps<'_>,
    ) -> Result<Self, Error> {
        let vm = Vm::new(kvm, &memory, root)?;
        (steps.vm)();
        let vcpus = prepared
            .vcpus
            .iter()
            .zip(0..)
            .map(|(vcpu, id)| Vcpu::restore(&vm, id, vcpu))
            .collect::<Result<_, vcpu::Error>>()?;
        // After the vCPUs, whose local APICs exist only now.
        vm.restore_irqchips(&prepared.vm)?;
        (steps.vcpus)();
        let backends = event_loop.backends(root.map(|root| root.len() as u64), frames)?;
        let devices = Devices::restore(&prepared.devices, backends, memory.ram().clone())?;
        connect(&vm, &devices)?;
        Ok(Self { core: Core { vm, memory, devices: Arc::new(devices) }, state: Paused { vcpus } })
    }
}

impl Machine<Paused> {
    /// Has the guest find these pages of its memory mapped when it reads them, where the host can do that. A hint: what the host
    /// refuses is left to the guest's own faults.
    pub fn pre_fault(&self, prepared: &PreparedMachine, runs: &[PageRun]) {
        let Some(vcpu) = self.state.vcpus.first().filter(|_| prepared.can_pre_fault) else { return };
        let mut ranges = runs.iter().flat_map(|&run| self.core.memory.guest_ranges(run));
        if let Err(error) = ranges.try_for_each(|(gpa, size)| vcpu.pre_fault(gpa, size)) {
            tracing::debug!(error = super::one_line(&error), "page tables are not filled ahead");
        }
    }
}

impl Machine<Paused> {
    /// Gives back those of the guest's `pages` that are equal to the complete `image` again, or nearly so ([`GuestMemory::trim`]); the
    /// guest cannot tell. Its event loop stands still, and is started with what was folded ([`super::EventLoop::with_folded`]).
    pub fn trim(&self, pages: &[Range<u64>], image: &File) -> Result<Trimmed, Error> {
        self.core.memory.trim(pages, image).map_err(Error::Rewind)
    }

    /// Takes a machine that has run back to the prepared state, in place: the guest cannot tell it from a new one. Its
    /// event loop stands still. Clocks stand until [`PreparedMachine::restart_clocks`]; devices wait for their kick.
    ///
    /// Pages the guest has written stay private copies up to `keep` bytes, which costs their memory and saves the guest
    /// from copying them again ([`GuestMemory::rewind`]).
    pub fn rewind(&mut self, prepared: &PreparedMachine, image: &File, keep: u64) -> Result<(), Error> {
        self.core.memory.rewind(image, keep).map_err(Error::Rewind)?;
        for (vcpu, prepared) in self.state.vcpus.iter_mut().zip(&prepared.vcpus) {
            vcpu.rewind(prepared)?;
        }
        // After the vCPUs, as in a restore.
        self.core.vm.restore_irqchips(&prepared.vm)?;
        Ok(self.core.devices.rewind(&prepared.devices)?)
    }
}

/// Joins device interrupts and doorbells with the VM; last, so that no interrupt is overwritten by restored state.
pub(super) fn connect(vm: &Vm, devices: &Devices) -> Result<(), vm::Error> {
    for (gsi, event) in devices.interrupts() {
        vm.connect_interrupt(event, gsi)?;
    }
    for kick in devices.kicks() {
        vm.connect_kick(kick.fd, kick.gpa)?;
    }
    Ok(())
}
