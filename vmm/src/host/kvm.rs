//! KVM: there, permitted, of which kind, able to do what.

use std::{fs, io, path::Path};

use kvm_ioctls::{Cap, Kvm};

use super::{Line, native};
use crate::vcpu::cpuid::SupportedCpuid;

const DEVICE: &str = "/dev/kvm";

/// Slowest guest instruction, in nanoseconds, that still counts as executed rather than emulated by KVM. Silicon needs
/// about 1, QEMU's emulation 10 to 50 (more when the machine is busy), KVM's emulator 300 or more.
const SLOWEST_NATIVE_NS: u64 = 150;

/// Capabilities without which nothing works, by their names in Documentation/virt/kvm/api.rst.
const REQUIRED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "IRQCHIP"),
    (Cap::UserMemory, "USER_MEMORY"),
    (Cap::SetTssAddr, "SET_TSS_ADDR"),
    (Cap::ExtCpuid, "EXT_CPUID"),
    (Cap::Irqfd, "IRQFD"),
    (Cap::Ioeventfd, "IOEVENTFD"),
    (Cap::VcpuEvents, "VCPU_EVENTS"),
    (Cap::Debugregs, "DEBUGREGS"),
    (Cap::Xsave, "XSAVE"),
    (Cap::Xcrs, "XCRS"),
    (Cap::AdjustClock, "ADJUST_CLOCK"),
    (Cap::KvmclockCtrl, "KVMCLOCK_CTRL"),
    (Cap::GetTscKhz, "GET_TSC_KHZ"),
    (Cap::TscDeadlineTimer, "TSC_DEADLINE_TIMER"),
    (Cap::SyncRegs, "SYNC_REGS"),
    (Cap::ImmediateExit, "IMMEDIATE_EXIT"),
    (Cap::ReadonlyMem, "READONLY_MEM"),
];

/// Capabilities that make forks better.
const WANTED: &[(u32, &str)] = &[
    (kvm_bindings::KVM_CAP_XSAVE2, "XSAVE2"),
    (kvm_bindings::KVM_CAP_VCPU_ATTRIBUTES, "VCPU_ATTRIBUTES"),
    (kvm_bindings::KVM_CAP_X86_MSR_FILTER, "X86_MSR_FILTER"),
];

/// What is known about KVM.
pub(super) struct Found {
    pub lines: Vec<Line>,
    pub runs_kvm: bool,
    pub runs_linux: bool,
}

/// Looks at KVM.
pub(super) fn probe() -> Found {
    let kvm = match open() {
        Ok(kvm) => kvm,
        Err(line) => return Found { lines: vec![line], runs_kvm: false, runs_linux: false },
    };
    let mut lines = vec![Line::ok(DEVICE, format!("usable, API version {}", kvm.get_api_version()))];
    lines.push(Line::ok("KVM flavour", kvm_flavour()));
    let capable = capabilities(&kvm, &mut lines);
    lines.push(pre_fault(&kvm));
    lines.push(nx_huge_pages());
    let runs_linux = guest(&kvm, &mut lines);
    let timers = timers(&kvm);
    let keeps_time = timers.status == super::Status::Ok;
    lines.push(timers);
    Found { lines, runs_kvm: capable, runs_linux: capable && runs_linux && keeps_time }
}

fn open() -> Result<Kvm, Line> {
    let error = match Kvm::new() {
        Ok(kvm) if kvm.get_api_version() == 12 => return Ok(kvm),
        Ok(kvm) => {
            let found = format!("API version {}", kvm.get_api_version());
            return Err(Line::missing(DEVICE, found, "use a kernel since Linux 2.6.22"));
        }
        Err(error) => io::Error::from_raw_os_error(error.errno()),
    };
    let remedy = match error.kind() {
        io::ErrorKind::NotFound => {
            "load the module (modprobe kvm_intel or kvm_amd); in a virtual machine switch nested virtualisation on"
        }
        io::ErrorKind::PermissionDenied => "join the group: usermod -aG kvm $USER, then log in again",
        _ => {
            "see dmesg for what KVM says; the processor's virtualisation may be off in the firmware's settings"
        }
    };
    Err(Line::missing(DEVICE, error.to_string(), remedy))
}

/// What carries KVM on this host: `vmx`, `svm` or `pvm`, and whether the host is itself a guest.
pub fn kvm_flavour() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag: &str| flags.split_ascii_whitespace().any(|word| word == flag);
    let module = |name: &str| Path::new("/sys/module").join(name).exists();
    let kind = if module("kvm_pvm") {
        "pvm"
    } else if module("kvm_intel") || has("vmx") {
        "vmx"
    } else if module("kvm_amd") || has("svm") {
        "svm"
    } else {
        "unknown"
    };
    if has("hypervisor") { format!("{kind}, nested") } else { kind.into() }
}

/// Pushes a line about capabilities; true if none that is required is missing.
fn capabilities(kvm: &Kvm, lines: &mut Vec<Line>) -> bool {
    const NAME: &str = "KVM capabilities";
    let names = |list: Vec<&str>| list.join(", ");
    let missing: Vec<_> =
        REQUIRED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, n)| *n).collect();
    let wanting: Vec<_> = WANTED
        .iter()
        .filter(|(cap, _)| kvm.check_extension_raw((*cap).into()) <= 0)
        .map(|(_, n)| *n)
        .collect();
    let capable = missing.is_empty();
    lines.push(if !capable {
        Line::missing(NAME, format!("without {}", names(missing)), "use a newer kernel")
    } else if !wanting.is_empty() {
        Line::degraded(NAME, format!("without {}", names(wanting)), "use a newer kernel")
    } else {
        Line::ok(NAME, format!("all {} that are used", REQUIRED.len() + WANTED.len()))
    });
    capable
}

fn pre_fault(kvm: &Kvm) -> Line {
    const NAME: &str = "KVM_PRE_FAULT_MEMORY";
    if kvm.check_extension_raw(kvm_bindings::KVM_CAP_PRE_FAULT_MEMORY.into()) > 0 {
        return Line::ok(NAME, "available");
    }
    let remedy = "forks fill their page tables by rehearsal alone; Linux 6.11 with EPT or NPT has it";
    Line::degraded(NAME, "not available", remedy)
}

fn nx_huge_pages() -> Line {
    const NAME: &str = "kvm.nx_huge_pages";
    let setting = fs::read_to_string("/sys/module/kvm/parameters/nx_huge_pages").unwrap_or_default();
    match setting.trim() {
        "Y" => {
            let remedy = "on processors not affected by iTLB multihit boot with kvm.nx_huge_pages=never: \
                          each new VM is spared a kernel thread, and guests keep executable 2 MiB pages";
            Line::degraded(NAME, "on", remedy)
        }
        "" => Line::ok(NAME, "no such setting"),
        other => Line::ok(NAME, if other == "N" { "off" } else { other }),
    }
}

/// Whether KVM knows that the time-stamp counters of guests run, by which it sets their timers.
fn timers(kvm: &Kvm) -> Line {
    const NAME: &str = "timers of guests";
    const REMEDY: &str = "load KVM anew (modprobe -r kvm_amd kvm_intel kvm, then modprobe the one that was there): it was loaded before \
                          the kernel knew the rate of the time-stamp counter, which takes some seconds after the boot";
    match native::counter_runs(kvm) {
        Ok(true) => Line::ok(NAME, "on time"),
        Ok(false) => Line::missing(NAME, "late, KVM takes the counter of a guest for stopped", REMEDY),
        Err(error) => Line::missing(NAME, error.to_string(), "see dmesg for what KVM says"),
    }
}

/// Pushes a line about how guest kernel code runs; true if a stock Linux guest can run.
fn guest(kvm: &Kvm, lines: &mut Vec<Line>) -> bool {
    const NAME: &str = "guest kernel code";
    const REMEDY: &str = "stock Linux guests need VMX or SVM; tests and the demonstration use the lab";
    let supported = match kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES) {
        Ok(list) => SupportedCpuid::new(&list, kvm.check_extension(Cap::TscDeadlineTimer)),
        Err(error) => {
            lines.push(Line::missing(NAME, format!("KVM_GET_SUPPORTED_CPUID: {error}"), REMEDY));
            return false;
        }
    };
    let line = match native::run(kvm, &supported) {
        Err(error) => Line::missing(NAME, error.to_string(), REMEDY),
        Ok(native) => match (native.stopped_at, native.picoseconds / 1000) {
            (Some(instruction), ns) => Line::missing(
                NAME,
                format!("KVM cannot execute {instruction}; {ns} ns an instruction"),
                REMEDY,
            ),
            (None, ns @ SLOWEST_NATIVE_NS..) => {
                Line::missing(NAME, format!("emulated, {ns} ns an instruction"), REMEDY)
            }
            (None, _) => {
                let ns = native.picoseconds as f64 / 1000.0;
                Line::ok(NAME, format!("runs natively, {ns:.1} ns an instruction"))
            }
        },
    };
    let able = line.status == super::Status::Ok;
    lines.push(line);
    able
}
