//! A test that stands still says where, and fails, instead of keeping all others waiting until nobody can ask any more.

use std::{
    fmt::Write as _,
    fs,
    io::{self, Write as _},
    path::Path,
    sync::mpsc::{self, RecvTimeoutError, Sender},
    thread,
    time::Duration,
};

use crate::proc;

/// Longest life of a daemon of a test; the longest takes a minute and a half on an emulated host that shares its core.
const LIMIT: Duration = Duration::from_secs(400);

/// Lines of a kernel stack that are shown.
const FRAMES: usize = 12;

/// Kills a daemon when this value is not dropped in time, which ends what its test waits for; tells before what all of the daemon's
/// processes were about.
#[derive(Debug)]
pub struct Overdue {
    /// Closed when this is dropped.
    _alive: Sender<()>,
}

impl Overdue {
    /// Watches the daemon `pid`, a child of this process; this value is dropped with it, before the number can be another process's.
    pub fn watch(pid: i32) -> Self {
        let (alive, ended) = mpsc::channel::<()>();
        thread::spawn(move || {
            if ended.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                let report = format!(
                    "a test is not done with forkd after {LIMIT:?}; it is killed now:\n{}",
                    tree(pid)
                );
                // Not by a macro, whose output would wait for the end of the test.
                let _ = io::stderr().write_all(report.as_bytes());
                proc::kill(pid);
            }
        });
        Self { _alive: alive }
    }
}

/// A process and its children, each with its threads: state, system call with its arguments, and kernel stack, as far as this user
/// may see them.
fn tree(pid: i32) -> String {
    let mut text = threads(pid);
    proc::children(pid).into_iter().for_each(|child| text += &threads(child));
    text
}

fn threads(pid: i32) -> String {
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    let mut text =
        format!("process {pid}: {}\n", read(format!("/proc/{pid}/cmdline").as_ref()).replace('\0', " "));
    for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let of = |file: &str| read(&task.path().join(file));
        let status = of("status");
        let state = status.lines().find(|line| line.starts_with("State:")).unwrap_or_default();
        let _ = writeln!(text, "  {}: {state}; call {}", of("comm").trim(), of("syscall").trim());
        of("stack").lines().take(FRAMES).for_each(|frame| text += &format!("    {frame}\n"));
    }
    text
}
