//! Wire formats shared by the host (`forkd`, `vmm`) and the guest (`agent`).
//!
//! Four of them, each pinned by tests because a snapshot taken by one build is forked by the next:
//!
//! 1. [`hypercall`]: what the agent says with an `out` instruction (forkpoint, acknowledgement, failure);
//! 2. [`mailbox`]: what the host writes into the fork's private memory before its first instruction;
//! 3. [`rpc`]: frames on a vsock stream once the fork runs;
//! 4. [`forward`]: the beginning of a vsock stream to a port of the guest.
//!
//! `no_std`: the crate allocates only where a message owns strings.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod config;
pub mod forward;
pub mod hypercall;
pub mod mailbox;
pub mod network;
pub mod rpc;
