//! The kernel command line: what every guest needs, then the template's own words.

/// Longest command line in bytes without its NUL (the kernel's COMMAND_LINE_SIZE on x86, less one).
pub const MAX: usize = 2047;

/// Built-in words; a template's own words come after and, where the kernel lets the last one count, win.
const BUILT_IN: &[&str] = &[
    // The console is the serial port; only errors go there, since each character is an exit.
    "console=ttyS0",
    "quiet",
    // One UART exists; do not look for three more.
    "8250.nr_uarts=1",
    // A panic ends the guest at once, through the ACPI reset register, where the VMM sees it.
    "panic=-1",
    "reboot=a",
    // There is no PCI; do not probe for it.
    "pci=off",
    // There is no PIT to check the timer interrupt against.
    "no_timer_check",
    // The guest's TSC stands still between freeze and activation: no clock may be checked against another.
    "tsc=reliable",
    // A parked fork sees minutes pass in an instant: no lock-up or stall is worth a report.
    "nowatchdog",
    "rcupdate.rcu_cpu_stall_suppress=1",
    // Mounts and network set-up wait for RCU; with one to eight vCPUs an expedited grace period costs little.
    "rcupdate.rcu_expedited=1",
    // Every page the guest clears is a private page of its fork: no clearing of what is written anyway,
    // no huge pages nobody asked for, no bounce buffers (64 MiB) for devices that do not exist.
    "init_on_alloc=0",
    "transparent_hugepage=madvise",
    "swiotlb=noforce",
    // All memory is of one type, and no device asks for another: without page attribute tables a page of the root file system is mapped
    // without looking its type up, 0.5 us each.
    "nopat",
    // Security modules and pressure accounting that no fork's host relies on lie on the path of every system call:
    // each function they call is a page fault in a fresh fork. Landlock stays, for the guest's own programs.
    "lsm=landlock,yama",
    "psi=0",
    // Kernel memory is not charged to the guest's cgroups: each object's account is one more private page. Processes' own is.
    "cgroup.memory=nokmem,nosocket",
    // An idle fork must stay idle: no sampling allocator and its timer.
    "kfence.sample_interval=0",
    // The seed handed over at boot counts; without it a host with no RDRAND makes early readers wait.
    "random.trust_bootloader=on",
    "random.trust_cpu=on",
];

/// Why a command line is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A character the kernel cannot take.
    #[error("the kernel command line has {found:?} at byte {at}; only printable ASCII is allowed")]
    NotPrintable {
        /// Byte offset in the template's words.
        at: usize,
        /// The character.
        found: char,
    },
    /// Too long in all.
    #[error(
        "the kernel command line is {0} bytes with the built-in words, at most {MAX} are allowed; shorten it"
    )]
    TooLong(usize),
}

/// The built-in words followed by `extra`, without a NUL.
pub fn build(extra: &str) -> Result<String, Error> {
    if let Some((at, found)) = extra.char_indices().find(|(_, c)| !matches!(c, ' '..='~')) {
        return Err(Error::NotPrintable { at, found });
    }
    let mut line = BUILT_IN.join(" ");
    let extra = extra.trim();
    if !extra.is_empty() {
        line.push(' ');
        line.push_str(extra);
    }
    if line.len() > MAX { Err(Error::TooLong(line.len())) } else { Ok(line) }
}

#[cfg(test)]
mod tests;
