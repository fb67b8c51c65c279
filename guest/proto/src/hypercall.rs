//! The hypercall: `out dx, eax` on [`PORT`] from user mode (IOPL 3 or an I/O permission bit).
//!
//! `eax` holds the call, `rbx` and `rcx` its arguments. The host stops the vCPU in the middle of the
//! instruction, so at a forkpoint the machine is at a known place in the agent.

/// I/O port of the hypercall.
pub const PORT: u16 = 0xF0C;

/// The guest may be forked here. `rbx`: virtual address of the mailbox, page aligned; `rcx`: its size in bytes.
pub const FORKPOINT: u32 = 1;

/// Identity is applied. `rbx`: the generation read from the mailbox; `rcx`: the nonce read from it.
pub const ACKNOWLEDGE: u32 = 2;

/// The agent gave up. `rbx`: virtual address of a UTF-8 message; `rcx`: its length, at most [`MAX_FAILURE`] bytes.
pub const FAIL: u32 = 3;

/// Longest failure message in bytes the host reads.
pub const MAX_FAILURE: usize = 1024;
