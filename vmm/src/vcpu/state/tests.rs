//! Timers of vCPUs that do not run: KVM is given what a guest would have set, and asked what it would do.

use std::thread;

use kvm_ioctls::Kvm;

use super::*;
use crate::{
    machine,
    memory::{guest::GuestMemory, layout::MIB},
    protocol::CpuTemplate,
    vcpu::{cpuid, msr_list},
};

/// Far from zero, which KVM takes for a new vCPU.
const TSC: u64 = 1 << 40;
const QUIET: Duration = Duration::from_millis(10);
/// What tells a time from a wrong one, on a host however busy.
const SLACK: f64 = 0.5;

struct Host {
    kvm: Kvm,
    vm: Vm,
}

impl Host {
    fn new() -> Self {
        let kvm = Kvm::new().unwrap();
        let vm = Self::vm(&kvm);
        Self { kvm, vm }
    }

    fn vm(kvm: &Kvm) -> Vm {
        Vm::new(kvm, &GuestMemory::fresh(MIB).unwrap(), None).unwrap()
    }

    /// A fork of a vCPU whose deadline timer has so many seconds left.
    fn fork(&self, seconds: u64) -> (Vcpu, PreparedVcpu) {
        let supported = machine::supported_cpuid(&self.kvm).unwrap();
        let cpuid = cpuid::guest(&supported, CpuTemplate::Host, 0, 1);
        let template = Vcpu::new(&Self::vm(&self.kvm), 0, cpuid).unwrap();
        let mut lapic = template.fd.get_lapic().unwrap();
        lapic::set_deadline_timer(&mut lapic, 0xEC);
        template.fd.set_lapic(&lapic).unwrap();
        let tsc = kvm_msr_entry { index: MSR_TSC, data: TSC, ..Default::default() };
        template.set_msrs(&Msrs::from_entries(&[tsc]).unwrap()).unwrap();
        arm(&template, seconds);
        let state = template.save(&msr_list(&self.kvm).unwrap()).unwrap();
        let prepared = state.prepare(0, self.vm.xsave_size()).unwrap();
        (Vcpu::restore(&self.vm, 0, &prepared).unwrap(), prepared)
    }
}

fn ticks_per_second(vcpu: &Vcpu) -> u64 {
    u64::from(vcpu.fd.get_tsc_khz().unwrap()) * 1000
}

/// As its guest does it.
fn arm(vcpu: &Vcpu, seconds: u64) {
    vcpu.set_deadline(vcpu.msr(MSR_TSC).unwrap() + seconds * ticks_per_second(vcpu)).unwrap();
}

/// Seconds to the interrupt, if one is to come.
fn left(vcpu: &Vcpu) -> Option<f64> {
    let deadline = vcpu.msr(MSR_TSC_DEADLINE).unwrap();
    let ticks = deadline.saturating_sub(vcpu.msr(MSR_TSC).unwrap());
    (deadline != 0).then(|| ticks as f64 / ticks_per_second(vcpu) as f64)
}

fn is_about(seconds: f64, vcpu: &Vcpu) {
    let left = left(vcpu).expect("an interrupt is to come");
    assert!((left - seconds).abs() < SLACK, "{left} s are left instead of {seconds}");
}

/// PVM keeps guests at the host's counter, so it cannot fail there; `time` of the Debian tests holds the same promise.
#[test]
fn the_age_of_a_vcpu_is_not_added_to_its_timer_at_a_rewind() {
    let host = Host::new();
    let (mut vcpu, prepared) = host.fork(100);
    // More than a second: KVM takes the counter's value for a new one then.
    for age in [Duration::ZERO, Duration::from_millis(1600)] {
        thread::sleep(age);
        vcpu.rewind(&prepared).unwrap();
        assert_eq!(left(&vcpu), None, "it stands still");
        vcpu.restart_clock(&prepared, QUIET, false).unwrap();
        is_about(100.0, &vcpu);
    }
}

#[test]
fn a_timer_that_the_guest_set_since_is_the_one_that_runs_on() {
    let host = Host::new();
    let (mut vcpu, prepared) = host.fork(100);
    for seconds in [10, 1000] {
        arm(&vcpu, seconds);
        vcpu.stop_timer().unwrap();
        assert_eq!(left(&vcpu), None, "it stands still");
        thread::sleep(Duration::from_millis(800));
        vcpu.restart_clock(&prepared, QUIET, false).unwrap();
        is_about(seconds as f64, &vcpu);
    }
}

#[test]
fn a_timer_that_the_guest_switched_off_stays_off() {
    let host = Host::new();
    let (mut vcpu, prepared) = host.fork(100);
    vcpu.restart_clock(&prepared, QUIET, false).unwrap();
    is_about(100.0, &vcpu);
    vcpu.set_deadline(0).unwrap();
    vcpu.stop_timer().unwrap();
    vcpu.restart_clock(&prepared, QUIET, false).unwrap();
    assert_eq!(left(&vcpu), None);
}

#[test]
fn a_timer_that_has_expired_meanwhile_fires_when_the_quiet_is_over() {
    let host = Host::new();
    let (mut vcpu, prepared) = host.fork(100);
    arm(&vcpu, 0);
    vcpu.stop_timer().unwrap();
    vcpu.restart_clock(&prepared, Duration::from_secs(20), false).unwrap();
    is_about(20.0, &vcpu);
}
