//! What figures are taken on, and what its kernel says of memory.

use std::{fs, process::Command};

use forkling_vmm::{host, sys::cpu};

/// What every figure says of its origin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// `native` or `lab`.
    pub place: String,
    /// Kernel and processors.
    pub host: String,
    /// KVM's flavour.
    pub kvm: String,
    /// Commit.
    pub rev: String,
}

/// Whether the host has KVM_PRE_FAULT_MEMORY.
pub fn can_pre_fault() -> bool {
    let capability = u64::from(kvm_bindings::KVM_CAP_PRE_FAULT_MEMORY);
    kvm_ioctls::Kvm::new().is_ok_and(|kvm| kvm.check_extension_raw(capability) > 0)
}

impl Origin {
    /// This host, and `rev` or the commit of the working directory.
    pub fn here(rev: Option<String>) -> Self {
        let uname = rustix::system::uname();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let memory = meminfo("MemTotal").unwrap_or_default() >> 20;
        let host = format!(
            "Linux {}, {cores} x {}, {memory} GiB",
            uname.release().to_string_lossy(),
            cpu_model().unwrap_or_else(|| "unknown processor".to_owned())
        );
        let place = if cpu::host_is_emulated() { "lab" } else { "native" };
        Self { place: place.to_owned(), host, kvm: host::kvm_flavour(), rev: rev.unwrap_or_else(commit) }
    }

    /// Whether time is counted in instructions and waiting takes none.
    pub fn is_lab(&self) -> bool {
        self.place == "lab"
    }
}

fn cpu_model() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn commit() -> String {
    let git = |args: &[&str]| {
        let output = Command::new("git").args(args).output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=10", "HEAD"]) else { return "unknown".to_owned() };
    let changed =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|text| !text.is_empty());
    if changed { commit + "+" } else { commit }
}

/// A line of `/proc/meminfo` in KiB.
pub fn meminfo(name: &str) -> Option<u64> {
    kib_line("/proc/meminfo", name)
}

/// A line `NAME: N kB` of a file of `/proc`, in KiB.
pub fn kib_line(path: &str, name: &str) -> Option<u64> {
    Some(forkling_tests::proc::kib_field(path, name)? / 1024)
}

/// The load of the last minute, of all processors.
pub fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|field| field.parse().ok()).unwrap_or_default()
}
