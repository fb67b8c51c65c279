//! Everything `unsafe` in the agent: one thin function or type per kernel interface that has no safe wrapper.

pub mod command;
pub mod hypercall;
pub mod mailbox;
pub mod mapped;
pub mod process;
pub mod random;
pub mod socket;
pub mod spawn;

use std::io;

/// Turns the -1 of a C call into the error in `errno`.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
