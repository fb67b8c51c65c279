//! Starting a program by a vfork that does what a command of the agent needs and nothing else.
//!
//! posix_spawn(3) asks for the disposition of each signal in each child, maps a stack for it, and cannot change the user: a tenth of
//! the time until a command has ended, in a fork whose memory is warm. fork(2) copies page tables and then pages.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::process::Pid;

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
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// All groups.
    pub groups: Vec<u32>,
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
    let mut child = Child {
        path: program.path.as_ptr(),
        arguments: arguments.as_ptr(),
        environment: environment.as_ptr(),
        directory: program.directory.as_deref().map_or(ptr::null(), CStr::as_ptr),
        streams: program.streams.each_ref().map(AsRawFd::as_raw_fd),
        user: program.user.as_ref().map_or(ptr::null(), ptr::from_ref),
        error: 0,
    };
    let mut stack = Vec::<MaybeUninit<u128>>::with_capacity(STACK / size_of::<u128>());
    let top = stack.spare_capacity_mut().as_mut_ptr_range().end;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // The agent has no handlers but those that Rust has for faults; in the child they would run on this stack.
    let before = block_signals()?;
    // SAFETY: the caller stands still until the child has replaced itself or ended (CLONE_VFORK), so `child`, what it points to and
    // the stack outlive it; `top` is its end, aligned to 16 bytes; `run` makes system calls only, and the process has no other thread.
    let result = check(unsafe { libc::clone(run, top.cast(), flags, (&raw mut child).cast()) });
    restore_signals(&before)?;
    let pid = result?;
    // SAFETY: the child wrote it, if at all, before the call returned.
    match unsafe { ptr::read_volatile(&raw const child.error) } {
        0 => Ok(Pid::from_raw(pid).expect("clone returned a process id")),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// [`Program`] as the kernel takes it.
struct Child {
    path: *const c_char,
    arguments: *const *const c_char,
    environment: *const *const c_char,
    directory: *const c_char,
    streams: [RawFd; 3],
    user: *const Ids,
    /// Why the program does not run.
    error: c_int,
}

/// The child: does not return when all goes well.
extern "C" fn run(child: *mut c_void) -> c_int {
    let child = child.cast::<Child>();
    // SAFETY: `spawn` gave a pointer to its own `Child`, which nobody else uses before this process is gone from it.
    let child = unsafe { &mut *child };
    // SAFETY: the pointers are those that `spawn` made of a `Program` that it still borrows.
    let error = unsafe { become_program(child) };
    // SAFETY: as above; volatile, because the parent reads it without the compiler knowing of this write.
    unsafe { ptr::write_volatile(&raw mut child.error, error) };
    // SAFETY: ends the process at once: nothing of the parent's, whose memory this is, is run or flushed.
    unsafe { libc::_exit(FAILED) }
}

/// Turns the process into the program; returns the error number if it cannot.
///
/// # Safety
/// All pointers are valid, and the lists end with null.
#[allow(clippy::multiple_unsafe_ops_per_block)]
unsafe fn become_program(child: &Child) -> c_int {
    // SAFETY: system calls with numbers, and with pointers that the caller vouches for; the wrappers used allocate nothing and take no lock.
    // Ids are set by the bare calls: the C library's would have all threads of the parent follow.
    unsafe {
        let done = libc::signal(libc::SIGPIPE, libc::SIG_DFL) != libc::SIG_ERR
            && libc::setpgid(0, 0) == 0
            && child.user.as_ref().is_none_or(|ids| {
                libc::syscall(libc::SYS_setgroups, ids.groups.len(), ids.groups.as_ptr()) == 0
                    && libc::syscall(libc::SYS_setresgid, ids.gid, ids.gid, ids.gid) == 0
                    && libc::syscall(libc::SYS_setresuid, ids.uid, ids.uid, ids.uid) == 0
            })
            && (0..).zip(child.streams).all(|(target, fd)| libc::dup2(fd, target) == target)
            && (child.directory.is_null() || libc::chdir(child.directory) == 0)
            && unblock_signals();
        if done {
            libc::execve(child.path, child.arguments, child.environment);
        }
        *libc::__errno_location()
    }
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

/// Lets every signal through; whether that worked. Allocates nothing.
fn unblock_signals() -> bool {
    let mut none = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set it is given.
    let made = unsafe { libc::sigemptyset(none.as_mut_ptr()) } == 0;
    // SAFETY: the set is initialised; no old one is asked for.
    made && unsafe { libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), ptr::null_mut()) } == 0
}
