//! Keeping every other program of the guest from running while its identity is not its own yet.
//!
//! On one CPU it is enough that the agent is a real-time task: nothing ordinary runs until it sleeps, and it does not
//! sleep. On several CPUs the others would go on, so all programs are frozen by the cgroup freezer. That costs
//! time and, in every fork, a wake-up of each program, which is why one CPU is treated apart.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::sys;

/// Where cgroup2 is mounted.
pub const CGROUPS: &str = "/sys/fs/cgroup";

/// The cgroup that programs are moved to when they are frozen for the first time.
const WORKLOAD: &str = "forkling-workload";

/// How long programs may take to freeze; one inside an uninterruptible system call does not.
const LIMIT: Duration = Duration::from_secs(5);

/// Why the guest could not be made quiet; it goes on as before.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the cgroup file system was refused.
    #[error("cannot use {path}")]
    Cgroup {
        /// The file.
        path: PathBuf,
        /// Reason.
        source: io::Error,
    },
    /// Programs were still running.
    #[error("programs in {0} did not freeze in time; one is inside an uninterruptible system call")]
    Busy(PathBuf),
    /// The scheduling class was refused.
    #[error("cannot put the agent above other programs")]
    Scheduler(#[source] io::Error),
}

/// Proof that no other program runs; dropping it lets them run again.
#[derive(Debug)]
pub struct Quiet {
    real_time: bool,
    frozen: Vec<PathBuf>,
}

impl Quiet {
    /// Makes the guest quiet.
    pub fn begin() -> Result<Self, Error> {
        let mut quiet = Self { real_time: false, frozen: Vec::new() };
        if one_cpu() {
            sys::process::set_real_time(true).map_err(Error::Scheduler)?;
            quiet.real_time = true;
        } else {
            let root = Path::new(CGROUPS);
            gather(root)?;
            quiet.freeze(root)?;
        }
        Ok(quiet)
    }

    fn freeze(&mut self, root: &Path) -> Result<(), Error> {
        for group in groups(root)? {
            let switch = group.join("cgroup.freeze");
            if read(&switch)?.trim() == "0" {
                write(&switch, "1")?;
                self.frozen.push(group);
            }
        }
        let deadline = Instant::now() + LIMIT;
        for group in &self.frozen {
            let events = group.join("cgroup.events");
            while !is_frozen(&read(&events)?) {
                if Instant::now() > deadline {
                    return Err(Error::Busy(group.clone()));
                }
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        Ok(())
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        if self.real_time {
            // Leaving a real-time class needs no privilege.
            let _ = sys::process::set_real_time(false);
        }
        for group in &self.frozen {
            // Fails only when the group is gone, and its programs with it.
            let _ = std::fs::write(group.join("cgroup.freeze"), "0");
        }
    }
}

fn one_cpu() -> bool {
    rustix::thread::sched_getaffinity(None).is_ok_and(|set| set.count() == 1)
}

/// Moves every program in the root cgroup but the agent to [`WORKLOAD`]; the root cannot be frozen. Commands start in
/// the root, because moving each at its start would cost more than this sweep, so one may start another meanwhile:
/// the sweep is over when it finds nothing to move.
fn gather(root: &Path) -> Result<(), Error> {
    let workload = root.join(WORKLOAD);
    match std::fs::create_dir(&workload) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Error::Cgroup { path: workload, source });
        }
        _ => {}
    }
    let (members, target) = (root.join("cgroup.procs"), workload.join("cgroup.procs"));
    let deadline = Instant::now() + LIMIT;
    loop {
        let mut moved = false;
        for pid in read(&members)?.lines().filter(|pid| is_program(pid)) {
            // A process that ended meanwhile or has no memory left (ESRCH) needs no moving.
            moved |= std::fs::write(&target, pid).is_ok();
        }
        if !moved {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Error::Busy(root.to_owned()));
        }
    }
}

/// Whether `pid` is neither the agent nor a kernel thread (all of those are children of kthreadd, which is 2).
fn is_program(pid: &str) -> bool {
    if pid == "2" || pid.parse() == Ok(std::process::id()) {
        return false;
    }
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    parent(&stat).is_some_and(|parent| parent != 2)
}

/// The parent in `/proc/PID/stat`: the second field behind the name, which may hold spaces and parentheses itself.
fn parent(stat: &str) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn groups(root: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = |source| Error::Cgroup { path: root.to_owned(), source };
    let mut groups = Vec::new();
    for entry in std::fs::read_dir(root).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            groups.push(entry.path());
        }
    }
    Ok(groups)
}

fn is_frozen(events: &str) -> bool {
    events.lines().any(|line| line == "frozen 1")
}

fn read(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|source| Error::Cgroup { path: path.to_owned(), source })
}

fn write(path: &Path, value: &str) -> Result<(), Error> {
    std::fs::write(path, value).map_err(|source| Error::Cgroup { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests;
