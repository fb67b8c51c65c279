//! Running a command as another user, or in another root.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::process::{Gid, Uid};

/// The standard library looks for this function when it starts a command in a directory, and without it falls back from posix_spawn(3),
/// a vfork, to fork(2), which copies the agent's page tables and then pages. It only asks weakly, which takes nothing out of a
/// static C library; this reference does.
#[used]
static CHANGES_DIRECTORY: unsafe extern "C" fn(
    *mut libc::posix_spawn_file_actions_t,
    *const libc::c_char,
) -> libc::c_int = libc::posix_spawn_file_actions_addchdir_np;

/// Makes `command` run with these ids. Costs a fork instead of a vfork; not for commands that run as root.
pub fn run_as(command: &mut Command, uid: Uid, gid: Gid, groups: Vec<Gid>) {
    let become_user = move || {
        // Groups and group first: without root they could not be set any more. The child of fork(2) has one
        // thread, so the calls that change one thread change the process.
        rustix::thread::set_thread_groups(&groups)?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes three system calls and allocates nothing.
    unsafe { command.pre_exec(become_user) };
}

/// Makes `command` run with the file system at `root` as its root.
///
/// # Errors
/// When the path holds a NUL.
pub fn enter_root(command: &mut Command, root: &Path) -> io::Result<()> {
    let root = CString::new(root.as_os_str().as_bytes())?;
    let enter = move || {
        rustix::process::chroot(root.as_c_str())?;
        Ok(rustix::process::chdir(c"/")?)
    };
    // SAFETY: between fork and exec the closure makes two system calls and allocates nothing.
    unsafe { command.pre_exec(enter) };
    Ok(())
}
