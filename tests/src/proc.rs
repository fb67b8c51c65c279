//! What `/proc` tells of processes.

use std::{
    fs, io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

/// A process that cannot be taken for a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    /// Process id.
    pub pid: i32,
    start: u64,
}

impl Process {
    /// The living process `pid`.
    pub fn find(pid: i32) -> Option<Self> {
        let (_, state, start) = stat(pid)?;
        (state != 'Z').then_some(Self { pid, start })
    }

    /// Whether it still runs; a zombie does not.
    pub fn is_alive(&self) -> bool {
        Self::find(self.pid) == Some(*self)
    }
}

/// Kills `pid` with SIGKILL.
///
/// # Panics
/// When there is no such process: the test meant a certain one.
pub fn kill(pid: i32) {
    signal(pid, rustix::process::Signal::KILL);
}

/// Sends a signal to `pid`.
///
/// # Panics
/// As [`kill`].
pub fn signal(pid: i32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid).expect("a process id");
    rustix::process::kill_process(pid, signal).expect("the process is there");
}

/// Living and dead children of `pid` that are not reaped.
pub fn children(pid: i32) -> Vec<i32> {
    let entries = fs::read_dir("/proc").expect("/proc is mounted");
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|&child| stat(child).is_some_and(|(parent, ..)| parent == pid)).collect()
}

/// Parent, state and start time of a process (`proc_pid_stat(5)`).
fn stat(pid: i32) -> Option<(i32, char, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything.
    let fields: Vec<&str> = text[text.rfind(')')? + 2..].split(' ').collect();
    Some((fields.get(1)?.parse().ok()?, fields.first()?.chars().next()?, fields.get(19)?.parse().ok()?))
}

/// The first argument of a process: which of a program's roles it has.
pub fn role(pid: i32) -> Option<String> {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    line.split(|&byte| byte == 0).nth(1).map(|role| String::from_utf8_lossy(role).into_owned())
}

/// Whether a process is one that a daemon keeps ahead of need: a zygote without a template, or a fork's process without a VM.
pub fn is_ahead_of_need(pid: i32) -> bool {
    is_spare(pid) || is_embryo(pid)
}

/// Whether a process is a zygote without a template.
pub fn is_spare(pid: i32) -> bool {
    name(pid) == "forkling-spare"
}

/// Whether a process is that of a fork without a VM.
pub fn is_embryo(pid: i32) -> bool {
    name(pid) == "forkling-embryo"
}

fn name(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim_end().to_owned()
}

/// What each open descriptor of a process refers to.
pub fn descriptors(pid: i32) -> Vec<(PathBuf, PathBuf)> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors of a living process of ours");
    entries.flatten().filter_map(|entry| Some((entry.path(), fs::read_link(entry.path()).ok()?))).collect()
}

/// Lines of `/proc/PID/maps`.
pub fn mappings(pid: i32) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/maps")).expect("mappings of a living process of ours");
    text.lines().map(str::to_owned).collect()
}

/// Resources that a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Open descriptors.
    pub descriptors: usize,
    /// Those of them that are memfds.
    pub memfds: usize,
    /// Mappings.
    pub mappings: usize,
    /// Threads.
    pub threads: usize,
}

/// What `pid` holds now.
pub fn holdings(pid: i32) -> Holdings {
    let descriptors = descriptors(pid);
    let is_memfd = |target: &Path| target.to_string_lossy().starts_with("/memfd:");
    Holdings {
        descriptors: descriptors.len(),
        memfds: descriptors.iter().filter(|(_, target)| is_memfd(target)).count(),
        mappings: mappings(pid).len(),
        threads: fs::read_dir(format!("/proc/{pid}/task")).expect("threads of a living process").count(),
    }
}

/// Reads the memory of a process.
pub fn read_memory(pid: i32, address: u64, buffer: &mut [u8]) -> io::Result<()> {
    fs::File::open(format!("/proc/{pid}/mem"))?.read_exact_at(buffer, address)
}

/// Value of a line `NAME: N kB` in a file of `/proc`, in bytes.
pub fn kib_field(path: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Every file below `directory`, with its length.
pub fn files(directory: &Path) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => found.extend(files(&path)),
            Ok(metadata) => found.push((path, metadata.size())),
            Err(_) => {}
        }
    }
    found.sort();
    found
}
