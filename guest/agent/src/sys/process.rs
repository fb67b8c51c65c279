//! Signals and scheduling of the agent itself.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr;

use rustix::process::Pid;

use super::check;

/// Blocks SIGCHLD and returns a non-blocking descriptor that is readable while one is pending. Commands get
/// an empty mask again from the standard library.
pub fn child_signals() -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set it is given.
    check(unsafe { libc::sigemptyset(set.as_mut_ptr()) })?;
    // SAFETY: the call above initialised it.
    let mut set = unsafe { set.assume_init() };
    // SAFETY: the set is initialised.
    check(unsafe { libc::sigaddset(&raw mut set, libc::SIGCHLD) })?;
    // SAFETY: the set is initialised; no old set is asked for.
    check(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) })?;
    // SAFETY: -1 asks for a new descriptor; the set is initialised.
    let fd = check(unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) })?;
    // SAFETY: signalfd returned a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Puts the agent above every ordinary process (SCHED_FIFO, lowest priority) or back among them. Children start as
/// ordinary processes in either case.
pub fn set_real_time(on: bool) -> io::Result<()> {
    let (policy, priority) = if on { (libc::SCHED_FIFO, 1) } else { (libc::SCHED_OTHER, 0) };
    let parameters = libc::sched_param { sched_priority: priority };
    // SAFETY: pid 0 is the caller; the kernel only reads `parameters`.
    check(unsafe { libc::sched_setscheduler(0, policy | libc::SCHED_RESET_ON_FORK, &raw const parameters) })?;
    Ok(())
}

/// Sends signal number `signal` to the process group `group`; that the group is gone is no error. EINVAL for a number
/// that is no signal.
pub fn kill_group(group: Pid, signal: u8) -> io::Result<()> {
    // SAFETY: kill takes numbers only. A negative id names the group; ours are never 0 or 1.
    match check(unsafe { libc::kill(-group.as_raw_pid(), libc::c_int::from(signal)) }) {
        Err(error) if error.raw_os_error() != Some(libc::ESRCH) => Err(error),
        _ => Ok(()),
    }
}
