//! Starting a program by a vfork that does what a command of the agent needs and nothing else.
//!
//! posix_spawn(3) asks for the disposition of each signal in each child, maps a stack for it, and cannot change the user: a tenth of
//! the time until a command has ended, in a fork whose memory is warm. fork(2) copies page tables and then pages.

use std::convert::Infallible;
use std::ffi::{CString, c_char, c_int, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;

use rustix::io::Errno;
use rustix::process::{Gid, Pid, Uid};

use super::check;

/// Bytes of the child's stack until it runs the program; it makes a dozen calls, none of them deep.
const STACK: usize = 64 * 1024;

/// Exit status of a child that could not run the program; nobody is told, since the error is.
const FAILED: c_int = 127;

/// What to run, and as what.
#[derive(Debug)]
pub struct Program {
    /// The file.
    pub path: CString,
    /// Its arguments, the name among them.
    pub arguments: Vec<CString>,
    /// `NAME=VALUE` each.
    pub environment: Vec<CString>,
    /// Working directory; the agent's own if none.
    pub directory: Option<CString>,
    /// Standard input, output and error. None of them is one of the agent's own three.
    pub streams: [OwnedFd; 3],
    /// Whose process it is; the agent's user's if none.
    pub user: Option<Ids>,
}

/// Ids of a user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ids {
    /// User id.
    pub uid: Uid,
    /// Group id.
    pub gid: Gid,
    /// All groups.
    pub groups: Vec<Gid>,
}

/// Runs `program` in a process group of its own, with no signal blocked and SIGPIPE as it is usual; returns when it runs. The id is also the group's.
///
/// # Errors
/// Those of clone(2), and of what the child does: setgroups(2), setresuid(2), chdir(2), execve(2).
///
/// # Panics
/// When a stream is one of the agent's own three, which dup2(2) would leave to be closed.
pub fn spawn(program: &Program) -> io::Result<Pid> {
    assert!(program.streams.iter().all(|stream| stream.as_raw_fd() > libc::STDERR_FILENO));
    let arguments = pointers(&program.arguments);
    let environment = pointers(&program.environment);
    let mut child =
        Child { program, arguments: arguments.as_ptr(), environment: environment.as_ptr(), error: None };
    let mut stack = Vec::<MaybeUninit<u128>>::with_capacity(STACK / size_of::<u128>());
    let top = stack.spare_capacity_mut().as_mut_ptr_range().end;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // What handles a fault here would run on the child's stack there.
    let before = block_signals()?;
    // SAFETY: the caller stands still until the child has replaced itself or ended (CLONE_VFORK), so `child`, what it points to and
    // the stack outlive it; `top` is the stack's end, aligned to 16 bytes; the process has no other thread.
    let result = check(unsafe { libc::clone(run, top.cast(), flags, (&raw mut child).cast()) });
    restore_signals(&before)?;
    let pid = result?;
    // SAFETY: the child wrote it, if at all, before the call returned; the compiler knows of neither.
    match unsafe { ptr::read_volatile(&raw const child.error) } {
        None => Ok(Pid::from_raw(pid).expect("clone returned a process id")),
        Some(error) => Err(error.into()),
    }
}

/// What the child works on: the parent's memory, while that stands still.
struct Child<'a> {
    program: &'a Program,
    /// [`Program::arguments`] as execve(2) takes them.
    arguments: *const *const c_char,
    /// [`Program::environment`] as execve(2) takes it.
    environment: *const *const c_char,
    /// Why the program does not run.
    error: Option<Errno>,
}

/// The child: does not return when all goes well.
extern "C" fn run(child: *mut c_void) -> c_int {
    // SAFETY: `spawn` gave a pointer to its own `Child`, which it does not use before this process is gone.
    let child = unsafe { &mut *child.cast::<Child<'_>>() };
    let Err(error) = become_program(child);
    // SAFETY: the field is this process's own until then; volatile, since the compiler does not know who reads it.
    unsafe { ptr::write_volatile(&raw mut child.error, Some(error)) };
    // SAFETY: ends the process at once: nothing of the parent's, whose memory this is, is run or flushed.
    unsafe { libc::_exit(FAILED) }
}

/// Turns the process into the program. Makes system calls, and allocates nothing.
fn become_program(child: &Child<'_>) -> Result<Infallible, Errno> {
    let Program { path, directory, streams: [stdin, stdout, stderr], user, .. } = child.program;
    // SAFETY: takes numbers. Rust ignores this signal, which a program would inherit.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    rustix::process::setpgid(None, None)?;
    if let Some(Ids { uid, gid, groups }) = user {
        // Groups and group first: without root they could not be set any more. The calls change one thread, and this process has no other.
        rustix::thread::set_thread_groups(groups)?;
        rustix::thread::set_thread_res_gid(*gid, *gid, *gid)?;
        rustix::thread::set_thread_res_uid(*uid, *uid, *uid)?;
    }
    rustix::stdio::dup2_stdin(stdin)?;
    rustix::stdio::dup2_stdout(stdout)?;
    rustix::stdio::dup2_stderr(stderr)?;
    if let Some(directory) = directory {
        rustix::process::chdir(directory)?;
    }
    unblock_signals();
    // SAFETY: `spawn` made both lists, which end with null, of strings that it still borrows.
    unsafe { libc::execve(path.as_ptr(), child.arguments, child.environment) };
    Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::NOEXEC))
}

/// As execve(2) takes them.
fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
}

/// Blocks all signals; returns the mask until then.
fn block_signals() -> io::Result<libc::sigset_t> {
    let (mut all, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
    // SAFETY: sigfillset initialises the set it is given.
    check(unsafe { libc::sigfillset(all.as_mut_ptr()) })?;
    // SAFETY: the set is initialised, and the kernel initialises the other.
    check(unsafe { libc::sigprocmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) })?;
    // SAFETY: the call above initialised it.
    Ok(unsafe { before.assume_init() })
}

fn restore_signals(mask: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: the mask is initialised; no old one is asked for.
    check(unsafe { libc::sigprocmask(libc::SIG_SETMASK, mask, ptr::null_mut()) }).map(drop)
}

/// Lets every signal through.
fn unblock_signals() {
    let mut none = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set it is given.
    unsafe { libc::sigemptyset(none.as_mut_ptr()) };
    // SAFETY: the set is initialised; no old one is asked for.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), ptr::null_mut()) };
}
