//! The hypercall port: permission to use it, and the `out` instruction.

use std::arch::asm;
use std::io;

use forkling_proto::hypercall::{ACKNOWLEDGE, FAIL, FORKPOINT, MAX_FAILURE, PORT};

use super::check;
use super::mailbox::Mailbox;

/// Width of the `out` in I/O ports; the permission bits of all of them are checked (Intel SDM 1, 20.5.2).
const WIDTH: libc::c_ulong = 4;

/// Permission of this process to execute `out` on the hypercall port, given back on drop.
///
/// Children inherit the permission (ioperm(2)), so it is held only around a hypercall and never while a
/// command is started: no program of the workload can speak to the host through the port.
#[derive(Debug)]
pub struct Port(());

impl Port {
    /// Asks the kernel for the port; needs CAP_SYS_RAWIO.
    pub fn open() -> io::Result<Self> {
        // SAFETY: ioperm changes the caller's I/O permissions and touches no memory of it.
        check(unsafe { libc::ioperm(libc::c_ulong::from(PORT), WIDTH, 1) })?;
        Ok(Self(()))
    }

    /// Stops at a forkpoint; on return `mailbox` holds what the host wrote.
    pub fn forkpoint(&self, mailbox: &mut Mailbox) {
        let (address, len) = (mailbox.address(), mailbox.len() as u64);
        // SAFETY: `self` proves the permission. The host writes only into the mailbox's `len` bytes, which the
        // exclusive borrow keeps from every other use, while this thread is inside the instruction.
        unsafe { out(FORKPOINT, address, len) }
    }

    /// Tells the host that the identity of `generation` is applied.
    pub fn acknowledge(&self, generation: u64, nonce: u64) {
        // SAFETY: `self` proves the permission; the host accesses no memory in this call.
        unsafe { out(ACKNOWLEDGE, generation, nonce) }
    }

    /// Tells the host why the agent gives up; at most [`MAX_FAILURE`] bytes of it.
    pub fn fail(&self, message: &str) {
        let message = &message[..message.floor_char_boundary(MAX_FAILURE)];
        // SAFETY: `self` proves the permission; the host only reads `message`, which outlives the instruction.
        unsafe { out(FAIL, message.as_ptr().expose_provenance() as u64, message.len() as u64) }
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        // SAFETY: as in `open`. Removing a permission that is held does not fail.
        unsafe { libc::ioperm(libc::c_ulong::from(PORT), WIDTH, 0) };
    }
}

/// `out dx, eax` with two arguments, see [`forkling_proto::hypercall`].
///
/// # Safety
/// The I/O permission must be held (else the kernel kills this process), and memory whose address is in `first`
/// must be usable by the host as the call says.
unsafe fn out(call: u32, first: u64, second: u64) {
    // SAFETY: the caller's contract. LLVM keeps rbx for itself, so the argument is exchanged in and back out; the
    // absence of `nomem` tells the compiler that memory changes.
    unsafe {
        asm!(
            "xchg rbx, {first}",
            "out dx, eax",
            "xchg rbx, {first}",
            first = inout(reg) first => _,
            in("rcx") second,
            in("dx") PORT,
            in("eax") call,
            options(nostack, preserves_flags),
        );
    }
}
