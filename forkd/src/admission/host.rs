//! What the host, and the control groups this process is in, have left.

use std::{
    fs,
    path::{Path, PathBuf},
};

use forkling_vmm::memory::layout::PAGE;
use rustix::process::{Resource, getrlimit};

/// Smallest reserve of memory in bytes when none is set, and the share of the host's memory beyond it.
const RESERVE: u64 = 256 << 20;
const RESERVE_SHARE: u64 = 32;

/// Processes and threads that stay free, for the daemon and for whoever has to repair the host.
const TASKS_RESERVE: u64 = 128;

/// Name of the limit on a user's processes.
pub const OWN_TASKS: &str = "RLIMIT_NPROC, LimitNPROC of the service";

/// What ran out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Places in the queue for constructions.
    Queue,
    /// Memory.
    Memory,
    /// Processes and threads.
    Processes,
}

/// What is left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Bytes of memory, to this process's control groups too.
    pub available: u64,
    /// Bytes of it that are not given away.
    pub reserve: u64,
    /// Processes and threads that may still be made.
    pub tasks: u64,
    /// Most processes and threads of this user's forks (RLIMIT_NPROC); no limit for root.
    pub own_tasks: u64,
    /// What bounds `tasks`.
    pub bounds: &'static str,
}

/// Lines of `memory.stat` about cached files, of both versions. Where a group's own and its children's are told apart,
/// its own are less, which errs on the safe side.
const CACHED: [&str; 2] = ["active_file", "inactive_file"];

/// Limits from here on are version 1's way to say that there is none.
const UNLIMITED: u64 = 1 << 60;

/// Reads it.
#[derive(Debug)]
pub struct Host {
    root: PathBuf,
    reserve: u64,
    own_tasks: u64,
    memory_groups: Vec<Group>,
    task_groups: Vec<Group>,
}

/// A control group's files of a limit and of what is used of it.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    limit: PathBuf,
    used: PathBuf,
}

impl Host {
    /// Of the host below `root`, which is `/` but for tests. `reserve` are bytes.
    pub fn new(root: PathBuf, reserve: Option<u64>) -> Self {
        let total = meminfo(&root, "MemTotal:").unwrap_or(0);
        let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
        let nproc = getrlimit(Resource::Nproc).current.filter(|_| !rustix::process::geteuid().is_root());
        Self {
            reserve: reserve.unwrap_or_else(|| RESERVE.max(total / RESERVE_SHARE)),
            own_tasks: nproc.map_or(u64::MAX, |limit| limit.saturating_sub(TASKS_RESERVE / 4)),
            memory_groups: find_groups(
                &root,
                &groups,
                "memory",
                [("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")],
            ),
            task_groups: find_groups(&root, &groups, "pids", [("pids.max", "pids.current"); 2]),
            root,
        }
    }

    /// Looks.
    pub fn look(&self) -> Room {
        // A host that says nothing is taken to be without bounds; the kernel's own refusals remain.
        let available = meminfo(&self.root, "MemAvailable:").unwrap_or(u64::MAX >> 1);
        let available = self.memory_groups.iter().filter_map(Group::left).fold(available, u64::min);
        let sysctl =
            |name: &str| number(&self.root.join("proc/sys/kernel").join(name)).unwrap_or(u64::MAX >> 1);
        let running = tasks(&self.root).unwrap_or(0) + TASKS_RESERVE;
        let mut left = [
            (sysctl("pid_max").saturating_sub(running), "kernel.pid_max"),
            (sysctl("threads-max").saturating_sub(running), "kernel.threads-max"),
            (u64::MAX >> 1, "pids.max of the control group"),
        ];
        for group in self.task_groups.iter().filter_map(Group::left) {
            left[2].0 = left[2].0.min(group.saturating_sub(TASKS_RESERVE / 4));
        }
        let (tasks, bounds) = left.into_iter().min_by_key(|(tasks, _)| *tasks).expect("there are some");
        Room { available, reserve: self.reserve, tasks, own_tasks: self.own_tasks, bounds }
    }

    /// Bytes of its own that process `pid` holds; `None` when it is gone.
    pub fn held(&self, pid: i32) -> Option<u64> {
        let text = fs::read_to_string(self.root.join(format!("proc/{pid}/statm"))).ok()?;
        // proc_pid_statm(5): size, resident and shared, in pages; what is resident and not of a file is its own.
        let mut fields = text.split(' ').skip(1).map(str::parse::<u64>);
        let (resident, shared) = (fields.next()?.ok()?, fields.next()?.ok()?);
        Some(resident.saturating_sub(shared) * PAGE)
    }
}

impl Group {
    /// What is left of it; `None` without a limit.
    fn left(&self) -> Option<u64> {
        let limit = number(&self.limit).filter(|&limit| limit < UNLIMITED)?;
        // Of memory, what caches files is used and can be had all the same (memory.stat).
        let stat = fs::read_to_string(self.limit.with_file_name("memory.stat")).unwrap_or_default();
        let lines = stat.lines().filter_map(|line| line.split_once(' '));
        let cached = lines
            .filter(|(name, _)| CACHED.contains(name))
            .filter_map(|(_, bytes)| bytes.parse::<u64>().ok());
        Some(limit.saturating_sub(number(&self.used)?.saturating_sub(cached.sum())))
    }
}

/// The groups of `controller` that this process is in, from its own to the root, of both cgroup versions
/// (cgroups(7)). A name is `[version 2, version 1]`.
fn find_groups(root: &Path, groups: &str, controller: &str, names: [(&str, &str); 2]) -> Vec<Group> {
    let mut found = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (mounts, (limit, used)): (&[&str], _) = match controllers {
            "" => (&["", "unified"], names[0]),
            controllers if controllers.split(',').any(|name| name == controller) => (&[controller], names[1]),
            _ => continue,
        };
        for mount in mounts {
            let mount = root.join("sys/fs/cgroup").join(mount);
            let own = mount.join(path.trim_start_matches('/'));
            let chain = own.ancestors().take_while(|directory| directory.starts_with(&mount));
            let files =
                chain.map(|directory| Group { limit: directory.join(limit), used: directory.join(used) });
            found.extend(files.filter(|group| group.limit.exists()));
        }
    }
    found
}

/// A line of `/proc/meminfo`, in bytes.
fn meminfo(root: &Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Processes and threads of the host (proc_loadavg(5): the fourth field is `running/all`).
fn tasks(root: &Path) -> Option<u64> {
    let text = fs::read_to_string(root.join("proc/loadavg")).ok()?;
    text.split(' ').nth(3)?.split('/').nth(1)?.parse().ok()
}

/// A file with one number; `None` for `max` too.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}
