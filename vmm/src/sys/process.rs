//! The process of a fork: making it, and keeping it small.

use std::ffi::CStr;
use std::io;

/// What the process is called as a zygote or fork, as `ps` shows it.
pub const NAME: &CStr = c"forkling-vmm";

/// What a zygote without a template is called.
pub const SPARE: &CStr = c"forkling-spare";

/// What the process of a fork is called that has no VM yet.
pub const EMBRYO: &CStr = c"forkling-embryo";

/// Renames this thread, which is the process if it has one (PR_SET_NAME).
pub fn set_name(name: &CStr) {
    if let Err(error) = rustix::thread::set_name(name) {
        tracing::debug!(%error, "the process keeps its name");
    }
}

/// Gives the unused memory of the heap back to the kernel (malloc_trim(3)).
pub fn trim_heap() {
    // SAFETY: the call takes a number, locks what it works on, and leaves live allocations alone.
    unsafe { libc::malloc_trim(0) };
}

/// Has all threads of this process and its children use one heap (M_ARENA_MAX of mallopt(3)): one for each thread is a mapping, page
/// tables and pages of its own.
pub fn use_one_heap() {
    // SAFETY: the call takes two numbers, and the process has one thread.
    let set = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    debug_assert_eq!(set, 1, "glibc has had this setting since 2.10");
}

/// Whether the kernel may use large pages in this process and its children (PR_SET_THP_DISABLE); a kernel without them does
/// not know the question.
pub fn allow_large_pages(allow: bool) {
    if let Err(error) = rustix::thread::disable_transparent_huge_pages(!allow) {
        tracing::debug!(%error, allow, "large pages are left as they are");
    }
}

/// Proof that this process had one thread when it was checked; its holder starts none.
pub struct SingleThreaded(());

impl SingleThreaded {
    /// Checks.
    ///
    /// # Panics
    /// When the process has more than one thread.
    pub fn check() -> io::Result<Self> {
        assert_eq!(std::fs::read_dir("/proc/self/task")?.count(), 1, "a zygote is single-threaded");
        Ok(Self(()))
    }
}

/// Which side of [`fork_as_sibling`] this is.
pub enum Forked {
    /// The caller; the new process has this id.
    Parent(i32),
    /// The new process.
    Child,
}

/// clone3(2) with `CLONE_PARENT`: like fork(2), but the child is a child of the caller's parent.
///
/// The daemon thereby supervises every fork itself, whatever happens to the zygote. glibc's at-fork handlers do not
/// run, so the caller must be single-threaded: then no lock can be held by a thread that the child lacks.
///
/// # Errors
/// EAGAIN at a process limit, ENOMEM.
pub fn fork_as_sibling(_: &SingleThreaded) -> io::Result<Forked> {
    let mut arguments = libc::clone_args {
        flags: libc::CLONE_PARENT as u64,
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: 0,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: 0,
    };
    // SAFETY: no memory is shared (no CLONE_VM) and the process has one thread (`SingleThreaded`), so the child is a full,
    // consistent copy that goes on on its own stack.
    let result =
        unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>()) };
    match result {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        pid => Ok(Forked::Parent(pid as i32)),
    }
}
