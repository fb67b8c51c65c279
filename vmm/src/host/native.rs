//! A tiny guest that runs kernel-mode code: is it executed or emulated, and can KVM execute what Linux needs?
//!
//! Where KVM has no hardware for it (PVM), it emulates each instruction a guest kernel without PVM support executes,
//! and stops at one its emulator lacks. The code is a bounded loop and two instructions of that kind. A watchdog ends
//! KVM_RUN should it take longer than [`LIMIT`].

use std::{
    sync::{OnceLock, mpsc},
    thread,
    time::{Duration, Instant},
};

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::{
    boot::{Entry, long_mode},
    memory::GuestRam,
    protocol::CpuTemplate,
    sys::{self, kick::Kickable, mapping::Mapping},
    vcpu::{
        self,
        cpuid::{self, SupportedCpuid},
    },
};

/// Memory of the guest in bytes: boot's tables and two pages.
const MEMORY: usize = 0x2_0000;

/// Where the code is.
const CODE: u64 = 0x1_0000;

/// Where the zeros are that the code works on; aligned for XRSTOR.
const DATA: u64 = 0x1_8000;

/// Port of the marks the code sets.
const MARK_PORT: u16 = 0xF0;

/// Rounds of the timed loop, two instructions each: 7 ms where each is emulated.
const ROUNDS: u64 = 10_000;

/// How often the loop is timed; the quickest counts, since a busy host only ever adds time.
const TRIES: u32 = 3;

/// Longest time the guest may run.
const LIMIT: Duration = Duration::from_millis(150);

/// One mark after each thing tried.
const PROGRAM: &[u8] = &[
    0xFF, 0xC9, // dec ecx
    0x75, 0xFC, // jnz to the start
    0xB0, 0x01, 0xE6, 0xF0, // mov al, 1; out 0xF0, al
    0x48, 0x0F, 0xC7, 0x0F, // cmpxchg16b [rdi]
    0xB0, 0x02, 0xE6, 0xF0, // mov al, 2; out 0xF0, al
    0x48, 0x0F, 0xAE, 0x2E, // xrstor64 [rsi]
    0xB0, 0x03, 0xE6, 0xF0, // mov al, 3; out 0xF0, al
    0xF4, // hlt
];

/// What the guest showed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Native {
    /// Time of one simple instruction, in picoseconds.
    pub picoseconds: u64,
    /// The first instruction KVM could not execute.
    pub stopped_at: Option<&'static str>,
}

/// Why the guest could not be run.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("no memory for a guest: {0}")]
    Memory(#[from] std::io::Error),
    #[error("cannot write to the guest: {0}")]
    Guest(#[from] GuestMemoryError),
    #[error("KVM refused: {0}")]
    Kvm(#[from] kvm_ioctls::Error),
    #[error("the guest stopped at once: {0}")]
    Stopped(String),
}

/// Runs the guest.
pub(super) fn run(kvm: &Kvm, supported: &SupportedCpuid) -> Result<Native, Error> {
    // Mappings are never unmapped, so there is one, however often the host is probed.
    static MAPPING: OnceLock<Mapping> = OnceLock::new();
    let mapping = match MAPPING.get() {
        Some(mapping) => *mapping,
        None => *MAPPING.get_or_init({
            let mapping = Mapping::anonymous(MEMORY)?;
            move || mapping
        }),
    };
    let vm = kvm.create_vm()?;
    sys::kvm::add_memory(&vm, 0, 0, &mapping, 0, MEMORY as u64, false)?;
    let ram = GuestRam::from_regions(vec![mapping.guest_region(0, MEMORY, 0)]).expect("one region");
    long_mode::write_tables(&ram)?;
    ram.write_slice(PROGRAM, GuestAddress(CODE))?;
    let mut vcpu = vm.create_vcpu(0)?;
    let entries = cpuid::guest(supported, CpuTemplate::Host, 0, 1);
    vcpu.set_cpuid2(&entries.to_kvm().expect("no more leaves than KVM gave"))?;
    // XRSTOR needs CR4.OSXSAVE, and that needs the feature; without it Linux needs neither.
    let xsave = supported.has("xsave");
    let mut sregs = vcpu.get_sregs()?;
    long_mode::apply(&mut sregs);
    if xsave {
        const CR4_OSFXSR: u64 = 1 << 9;
        const CR4_OSXSAVE: u64 = 1 << 18;
        sregs.cr4 |= CR4_OSFXSR | CR4_OSXSAVE;
    }
    vcpu.set_sregs(&sregs)?;
    watched(&mut vcpu, |vcpu| measure(vcpu, xsave))
}

/// Whether a vCPU's time-stamp counter runs as KVM reads it. Where it does not, KVM has refused the rate that it gives to each vCPU
/// itself and goes on without a scale (set_tsc_khz() of arch/x86/kvm/x86.c, Linux 6.1); guests see the counter run all the same.
pub(super) fn counter_runs(kvm: &Kvm) -> Result<bool, kvm_ioctls::Error> {
    let vcpu = kvm.create_vm()?.create_vcpu(0)?;
    let before = vcpu::time_stamp(&vcpu)?;
    thread::sleep(Duration::from_millis(1));
    Ok(vcpu::time_stamp(&vcpu)? != before)
}

/// Runs `work`, which runs the vCPU, and kicks the vCPU should it take longer than [`LIMIT`].
fn watched<T>(vcpu: &mut VcpuFd, work: impl FnOnce(&mut VcpuFd) -> T) -> T {
    let (_kickable, handle) = Kickable::enter(vcpu);
    let (done, is_done) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            if is_done.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
                // The thread waits below for this scope, so it exists.
                let _ = handle.kick();
            }
        });
        let result = work(vcpu);
        drop(done);
        result
    })
}

fn measure(vcpu: &mut VcpuFd, xsave: bool) -> Result<Native, Error> {
    // Once around, so that page tables are filled and code is known to all layers below.
    run_to_mark(vcpu, 1, 1).map_err(Error::Stopped)?;
    let overhead = quickest(vcpu, 1)?;
    let time = quickest(vcpu, ROUNDS)?.saturating_sub(overhead);
    let picoseconds = (time.as_nanos() * 1000 / u128::from(2 * (ROUNDS - 1))) as u64;
    let stopped_at = if run_to_mark(vcpu, 0, 2).is_err() {
        Some("cmpxchg16b")
    } else if xsave && run_to_mark(vcpu, 0, 3).is_err() {
        Some("xrstor")
    } else {
        None
    };
    Ok(Native { picoseconds, stopped_at })
}

/// The shortest time that `rounds` rounds of the loop took.
fn quickest(vcpu: &mut VcpuFd, rounds: u64) -> Result<Duration, Error> {
    let mut quickest = Duration::MAX;
    for _ in 0..TRIES {
        let begin = Instant::now();
        run_to_mark(vcpu, rounds, 1).map_err(Error::Stopped)?;
        quickest = quickest.min(begin.elapsed());
    }
    Ok(quickest)
}

/// Runs until the mark `mark`: from the start with `rounds` rounds, or on from where it stopped if `rounds` is 0.
fn run_to_mark(vcpu: &mut VcpuFd, rounds: u64, mark: u8) -> Result<(), String> {
    if rounds > 0 {
        let mut regs = long_mode::regs(Entry { rip: CODE, rsi: DATA });
        regs.rcx = rounds;
        regs.rdi = DATA;
        vcpu.set_regs(&regs).map_err(|e| e.to_string())?;
    }
    match vcpu.run() {
        Ok(VcpuExit::IoOut(MARK_PORT, [found])) if *found == mark => Ok(()),
        Ok(exit) => Err(format!("{exit:?}")),
        Err(error) => Err(error.to_string()),
    }
}
