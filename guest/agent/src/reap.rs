//! Collecting dead processes: the agent's own commands, and every orphan, whose parent PID 1 becomes.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, RawPid, WaitOptions, WaitStatus};

use crate::sys;

/// The only place that waits for processes, so that no status can be taken away from its owner.
#[derive(Debug)]
pub struct Reaper {
    signals: OwnedFd,
    watched: BTreeSet<RawPid>,
    exits: VecDeque<(Pid, WaitStatus)>,
}

impl Reaper {
    /// Starts to listen for SIGCHLD.
    pub fn new() -> io::Result<Self> {
        Ok(Self { signals: sys::process::child_signals()?, watched: BTreeSet::new(), exits: VecDeque::new() })
    }

    /// Readable when [`Self::reap`] has something to do.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }

    /// Keeps the status of `pid`, a child just started, for [`Self::next_exit`]; statuses of others are dropped.
    pub fn watch(&mut self, pid: Pid) {
        self.watched.insert(pid.as_raw_pid());
    }

    /// Drops the status of `pid`; the process itself is reaped all the same.
    pub fn forget(&mut self, pid: Pid) {
        self.watched.remove(&pid.as_raw_pid());
        self.exits.retain(|(exited, _)| *exited != pid);
    }

    /// Collects every process that has ended by now.
    pub fn reap(&mut self) {
        let mut pending = [0_u8; 512];
        while matches!(rustix::io::read(&self.signals, &mut pending), Ok(count) if count > 0) {}
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    if self.watched.remove(&pid.as_raw_pid()) {
                        self.exits.push_back((pid, status));
                    }
                }
                Err(Errno::INTR) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// The next watched process that has ended.
    pub fn next_exit(&mut self) -> Option<(Pid, WaitStatus)> {
        self.exits.pop_front()
    }

    /// The status of `pid` if it has ended.
    pub fn take(&mut self, pid: Pid) -> Option<WaitStatus> {
        let at = self.exits.iter().position(|(exited, _)| *exited == pid)?;
        self.exits.remove(at).map(|(_, status)| status)
    }

    /// Sleeps until a process ends, `other` is readable, or `deadline` has passed, and reaps.
    pub fn pause(&mut self, other: Option<BorrowedFd<'_>>, deadline: Instant) -> io::Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        let mut fds = vec![PollFd::new(&self.signals, PollFlags::IN)];
        fds.extend(other.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        self.reap();
        Ok(())
    }

    /// Waits for `pid`, a watched child, to end; `None` if it has not by `deadline`.
    pub fn wait_for(&mut self, pid: Pid, deadline: Instant) -> io::Result<Option<WaitStatus>> {
        loop {
            if let Some(status) = self.take(pid) {
                return Ok(Some(status));
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            self.pause(None, deadline)?;
        }
    }
}
