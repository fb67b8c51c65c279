//! Saving and restoring a vCPU, each in the one order that works.
//!
//! The orders are Firecracker's; every line says what breaks without it. The list of MSRs comes from KVM itself,
//! never from us (KVM developers in virt-pvm issue 2), with the memory-type registers added that it leaves out.

use std::{sync::Arc, time::Duration};

use kvm_bindings::{
    CpuId, Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::{Error, Vcpu, cpuid::CpuidEntries, lapic};
use crate::{
    snapshot::blob,
    sys::{cpu, kvm::XsaveArea},
    vm::Vm,
};

/// IA32_TIME_STAMP_COUNTER.
const MSR_TSC: u32 = 0x10;
/// MSR_KVM_SYSTEM_TIME, old and new: bit 0 is set while the guest uses the paravirtual clock.
const MSR_KVM_SYSTEM_TIME: [u32; 2] = [0x12, 0x4B56_4D01];
/// IA32_TSC_DEADLINE.
const MSR_TSC_DEADLINE: u32 = 0x6E0;
/// Memory-type range registers, which KVM_GET_MSR_INDEX_LIST leaves out: capability-independent numbers of
/// IA32_MTRR_PHYSBASE0.. PHYSMASK7, the fixed ranges and the default type.
const MTRRS: [u32; 28] = [
    0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20A, 0x20B, 0x20C, 0x20D, 0x20E,
    0x20F, 0x250, 0x258, 0x259, 0x268, 0x269, 0x26A, 0x26B, 0x26C, 0x26D, 0x26E, 0x26F, 0x2FF,
];
/// MSRs that KVM may report and then reject, and whose loss no guest of ours can see: IA32_FEATURE_CONTROL (no VMX
/// is offered). Every other rejection is an error.
const MAY_BE_REJECTED: [u32; 1] = [0x3A];
/// Segment type of a busy and of an available 64-bit TSS (AMD64 manual, volume 2, table 4-6).
const TSS_BUSY: u8 = 11;
const TSS_AVAILABLE: u8 = 9;

/// A saved vCPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    #[serde(with = "blob")]
    mp_state: kvm_mp_state,
    #[serde(with = "blob")]
    regs: kvm_regs,
    #[serde(with = "blob")]
    sregs: kvm_sregs,
    #[serde(with = "blob::bytes")]
    xsave: Vec<u8>,
    #[serde(with = "blob")]
    xcrs: kvm_xcrs,
    #[serde(with = "blob")]
    debug_regs: kvm_debugregs,
    #[serde(with = "blob")]
    lapic: kvm_lapic_state,
    cpuid: Arc<CpuidEntries>,
    tsc_khz: u32,
    #[serde(with = "blob::list")]
    msrs: Vec<kvm_msr_entry>,
    #[serde(with = "blob")]
    events: kvm_vcpu_events,
}

/// A timer that stands still.
#[derive(Clone, Copy, Debug)]
pub(super) struct StoppedTimer {
    /// What was left of it, in ticks of the time-stamp counter.
    left: u64,
    /// What the guest's time-stamp counter is ahead of the host's, modulo 2^64, if both run at the same rate.
    tsc_offset: Option<u64>,
}

/// A saved vCPU in the form in which KVM takes it, made once per zygote.
pub struct PreparedVcpu {
    state: VcpuState,
    cpuid: CpuId,
    xsave: XsaveArea,
    msrs: Msrs,
    /// Ticks of the time-stamp counter from the guest's first instruction to its next timer interrupt.
    timer: Option<u64>,
}

impl VcpuState {
    /// The CPUID the guest sees.
    pub fn cpuid(&self) -> &CpuidEntries {
        &self.cpuid
    }

    /// Frequency of the guest's time-stamp counter in kHz.
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// Whether the guest uses KVM's paravirtual clock.
    pub fn uses_kvmclock(&self) -> bool {
        self.msrs.iter().any(|msr| MSR_KVM_SYSTEM_TIME.contains(&msr.index) && msr.data & 1 != 0)
    }

    /// Validates the untrusted state and turns it into what KVM takes. `xsave_size` is [`Vm::xsave_size`].
    pub fn prepare(mut self, id: u8, xsave_size: usize) -> Result<PreparedVcpu, Error> {
        let bad = |field| Error::BadState { vcpu: id, field };
        if cpu::host_is_emulated() && self.sregs.tr.type_ == TSS_BUSY {
            // QEMU's I/O permission check wants an available TSS; with KVM's busy one every user-mode `out` faults.
            self.sregs.tr.type_ = TSS_AVAILABLE;
        }
        let timer = self.take_timer();
        let cpuid = self.cpuid.to_kvm().map_err(|_| bad("cpuid"))?;
        let xsave = XsaveArea::from_bytes(xsave_size, &self.xsave).ok_or_else(|| bad("xsave"))?;
        // Set at activation: a parked fork's timer stands still.
        let msrs: Vec<_> = self.msrs.iter().filter(|msr| msr.index != MSR_TSC_DEADLINE).copied().collect();
        Ok(PreparedVcpu {
            cpuid,
            xsave,
            msrs: Msrs::from_entries(&msrs).map_err(|_| bad("msrs"))?,
            timer,
            state: self,
        })
    }
}

impl VcpuState {
    /// Time to the timer's next interrupt, or to the one that is pending, in ticks; none if the timer is off.
    fn take_timer(&mut self) -> Option<u64> {
        let vector = lapic::deadline_timer_vector(&self.lapic)?;
        let value = |index| self.msrs.iter().find(|msr| msr.index == index).map(|msr| msr.data);
        let (tsc, deadline) = (value(MSR_TSC)?, value(MSR_TSC_DEADLINE)?);
        let pending = lapic::take_pending(&mut self.lapic, vector);
        (pending || deadline != 0).then(|| deadline.saturating_sub(tsc))
    }
}

impl Vcpu {
    /// Saves the vCPU. All vCPUs of the VM are stopped, and the last exit is completed ([`Vcpu::complete_exit`]).
    pub fn save(&self, msr_list: &[u32]) -> Result<VcpuState, Error> {
        let Self { fd, id: _, xsave_size, cpuid, same_rate: _, timer: _ } = self;
        // First: it may still deliver a pending INIT or SIPI and so change everything below.
        let mp_state = fd.get_mp_state().map_err(self.kvm("KVM_GET_MP_STATE"))?;
        let regs = fd.get_regs().map_err(self.kvm("KVM_GET_REGS"))?;
        let sregs = fd.get_sregs().map_err(self.kvm("KVM_GET_SREGS"))?;
        let xsave = XsaveArea::get(fd, *xsave_size).map_err(self.kvm("KVM_GET_XSAVE2"))?.to_bytes();
        let xcrs = fd.get_xcrs().map_err(self.kvm("KVM_GET_XCRS"))?;
        let debug_regs = fd.get_debug_regs().map_err(self.kvm("KVM_GET_DEBUGREGS"))?;
        let lapic = fd.get_lapic().map_err(self.kvm("KVM_GET_LAPIC"))?;
        let tsc_khz = fd.get_tsc_khz().map_err(self.kvm("KVM_GET_TSC_KHZ"))?;
        // As it was given, not as KVM_GET_CPUID2 tells it: KVM works out the bits that change at run time by itself,
        // and PVM adds what user mode sees anyway, which no host could be asked to give.
        let cpuid = cpuid.clone();
        let msrs = self.save_msrs(msr_list)?;
        // Last: reading the LAPIC or an MSR may change pending events.
        let events = fd.get_vcpu_events().map_err(self.kvm("KVM_GET_VCPU_EVENTS"))?;
        Ok(VcpuState { mp_state, regs, sregs, xsave, xcrs, debug_regs, lapic, cpuid, tsc_khz, msrs, events })
    }

    /// Makes vCPU `id` with all its state but the clock.
    pub fn restore(vm: &Vm, id: u8, prepared: &PreparedVcpu) -> Result<Self, Error> {
        let mut vcpu = Self::with_cpuid(vm, id, prepared.state.cpuid.clone(), &prepared.cpuid)?;
        vcpu.same_rate = vcpu.set_tsc_frequency(prepared.state.tsc_khz)?;
        vcpu.load(prepared)?;
        Ok(vcpu)
    }

    /// Gives a vCPU that has run the state again with which it began, all but the clock. Its last exit is completed.
    pub fn rewind(&mut self, prepared: &PreparedVcpu) -> Result<(), Error> {
        // Before the LAPIC, which would start the timer anew from this register.
        self.set_deadline(0)?;
        self.load(prepared)
    }

    fn load(&mut self, prepared: &PreparedVcpu) -> Result<(), Error> {
        let PreparedVcpu { state, xsave, msrs, .. } = prepared;
        let fd = &self.fd;
        fd.set_mp_state(state.mp_state).map_err(self.kvm("KVM_SET_MP_STATE"))?;
        fd.set_regs(&state.regs).map_err(self.kvm("KVM_SET_REGS"))?;
        fd.set_sregs(&state.sregs).map_err(self.kvm("KVM_SET_SREGS"))?;
        // Before xcrs on purpose: the area is written whole, and XCR0 then limits what the guest uses of it.
        xsave.set(fd).map_err(self.kvm("KVM_SET_XSAVE"))?;
        fd.set_xcrs(&state.xcrs).map_err(self.kvm("KVM_SET_XCRS"))?;
        fd.set_debug_regs(&state.debug_regs).map_err(self.kvm("KVM_SET_DEBUGREGS"))?;
        // After sregs, which hold the APIC's base and mode.
        fd.set_lapic(&state.lapic).map_err(self.kvm("KVM_SET_LAPIC"))?;
        // After the LAPIC: before it, a few restores in a hundred lose their timer (Kata pull request 13798).
        self.set_msrs(msrs)?;
        // After regs, which clear pending exceptions.
        fd.set_vcpu_events(&state.events).map_err(self.kvm("KVM_SET_VCPU_EVENTS"))?;
        // After the MSRs: the counter was written. What KVM makes of that depends on the time since the last write, and
        // whatever the guest has done to its counter is undone.
        self.timer = prepared.timer.map(|left| self.stopped(left)).transpose()?;
        Ok(())
    }

    /// Has the timer stand still with what is left of it, until [`Vcpu::restart_clock`]. The vCPU is stopped.
    pub fn stop_timer(&mut self) -> Result<(), Error> {
        let deadline = self.msr(MSR_TSC_DEADLINE)?;
        // Of a timer that has fired and is not set again nothing is left: KVM holds its interrupt, if it is not delivered.
        self.timer = match deadline {
            0 => None,
            _ => Some(self.stopped(deadline.saturating_sub(self.msr(MSR_TSC)?))?),
        };
        // Else it would fire while the guest waits, and its interrupt would come with the first instruction.
        self.set_deadline(0)
    }

    fn stopped(&self, left: u64) -> Result<StoppedTimer, Error> {
        // Before the guest's: what lies between the two makes timers late, never early.
        let host = cpu::time_stamp();
        let tsc_offset = if self.same_rate { Some(self.msr(MSR_TSC)?.wrapping_sub(host)) } else { None };
        Ok(StoppedTimer { left, tsc_offset })
    }

    fn msr(&self, index: u32) -> Result<u64, Error> {
        read_msr(&self.fd, index).map_err(self.kvm("KVM_GET_MSRS"))
    }

    fn set_deadline(&self, data: u64) -> Result<(), Error> {
        let deadline = kvm_msr_entry { index: MSR_TSC_DEADLINE, data, ..Default::default() };
        self.set_msrs(&Msrs::from_entries(&[deadline]).expect("one entry"))
    }

    /// Arms the timer, counted from now: as it stood, but not before `quiet` has passed. A timer may fire late, never early.
    ///
    /// The time-stamp counter is not set again: it has run on since the restore or rewind, the same on all vCPUs, and the
    /// guest's clock does not follow it ([`Vm::set_clock`]). Setting it would be no use either, since KVM takes a value that
    /// comes within a second of the last one for an attempt to synchronise vCPUs and keeps the old (`kvm_synchronize_tsc`).
    ///
    /// `advanced` is whether the guest's time jumps: only then must its watchdogs be told that it was stopped
    /// (KVM_KVMCLOCK_CTRL, Firecracker issue 5494). A guest that is, is busy with it for 0.1 ms.
    pub fn restart_clock(
        &mut self,
        prepared: &PreparedVcpu,
        quiet: Duration,
        advanced: bool,
    ) -> Result<(), Error> {
        if let Some(StoppedTimer { left, tsc_offset }) = self.timer.take() {
            let quiet = quiet.as_micros() as u64 * u64::from(prepared.state.tsc_khz) / 1000;
            let now = match tsc_offset {
                Some(offset) => cpu::time_stamp().wrapping_add(offset),
                None => self.msr(MSR_TSC)?,
            };
            self.set_deadline(now.saturating_add(left.max(quiet)))?;
        }
        if !advanced {
            return Ok(());
        }
        match self.fd.kvmclock_ctrl() {
            // EINVAL: the guest does not use the paravirtual clock.
            Err(error) if error.errno() != libc::EINVAL => Err(self.kvm("KVM_KVMCLOCK_CTRL")(error)),
            _ => Ok(()),
        }
    }

    /// Whether the guest's counter runs at the host's rate.
    fn set_tsc_frequency(&self, saved_khz: u32) -> Result<bool, Error> {
        // A smaller difference is measurement noise of the host's own calibration (Firecracker's bound).
        const TOLERANCE_PPM: u64 = 250;
        let host_khz = self.fd.get_tsc_khz().map_err(self.kvm("KVM_GET_TSC_KHZ"))?;
        let difference = u64::from(saved_khz.abs_diff(host_khz));
        if saved_khz == 0 || difference * 1_000_000 <= u64::from(host_khz) * TOLERANCE_PPM {
            return Ok(true);
        }
        self.fd.set_tsc_khz(saved_khz).map_err(self.kvm("KVM_SET_TSC_KHZ"))?;
        Ok(false)
    }

    /// Reads the MSRs one list at a time; one that KVM lists but this guest's CPUID hides has no state.
    fn save_msrs(&self, list: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
        let mut wanted: Vec<u32> = list.iter().chain(&MTRRS).copied().collect();
        wanted.sort_unstable();
        wanted.dedup();
        let mut saved = Vec::with_capacity(wanted.len());
        let mut rest = &wanted[..];
        while !rest.is_empty() {
            let entries: Vec<_> =
                rest.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
            let mut msrs = Msrs::from_entries(&entries).expect("a few dozen entries");
            let read = self.fd.get_msrs(&mut msrs).map_err(self.kvm("KVM_GET_MSRS"))?;
            saved.extend_from_slice(&msrs.as_slice()[..read]);
            rest = rest.get(read + 1..).unwrap_or(&[]);
        }
        Ok(with_timer_armed(saved))
    }

    /// Writes MSRs; KVM stops at the first it rejects and says how many it took.
    pub(super) fn set_msrs(&self, msrs: &Msrs) -> Result<(), Error> {
        let entries = msrs.as_slice();
        let mut written = self.fd.set_msrs(msrs).map_err(self.kvm("KVM_SET_MSRS"))?;
        while written < entries.len() {
            let rejected = &entries[written];
            if !MAY_BE_REJECTED.contains(&rejected.index) {
                return Err(Error::MsrRejected { msr: rejected.index });
            }
            let rest = Msrs::from_entries(&entries[written + 1..]).expect("shorter than a valid list");
            written += 1 + self.fd.set_msrs(&rest).map_err(self.kvm("KVM_SET_MSRS"))?;
        }
        Ok(())
    }
}

/// A vCPU's time-stamp counter now, as KVM reads it.
pub(crate) fn time_stamp(fd: &VcpuFd) -> Result<u64, kvm_ioctls::Error> {
    read_msr(fd, MSR_TSC)
}

fn read_msr(fd: &VcpuFd, index: u32) -> Result<u64, kvm_ioctls::Error> {
    let entry = kvm_msr_entry { index, ..Default::default() };
    let mut msrs = Msrs::from_entries(&[entry]).expect("one entry");
    fd.get_msrs(&mut msrs)?;
    Ok(msrs.as_slice()[0].data)
}

/// A deadline of zero at the save may mean that the timer has just fired and its interrupt is on the way; the guest
/// would wait for ever. A deadline of now is at worst one early interrupt (Firecracker issue 4618).
fn with_timer_armed(mut msrs: Vec<kvm_msr_entry>) -> Vec<kvm_msr_entry> {
    let tsc = msrs.iter().find(|msr| msr.index == MSR_TSC).map(|msr| msr.data);
    if let (Some(tsc), Some(deadline)) = (tsc, msrs.iter_mut().find(|msr| msr.index == MSR_TSC_DEADLINE))
        && deadline.data == 0
    {
        deadline.data = tsc;
    }
    msrs
}

#[cfg(test)]
mod tests;
