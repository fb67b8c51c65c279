//! The user-space network of all forks of a daemon: switch, NAT, resolver, egress policy.
//!
//! It runs as a process of its own (`forkd net`), because it parses what hostile guests send. It holds no guest memory,
//! no snapshot and no privilege: frames come and go on one socket for each guest, and leave as ordinary host sockets.
//!
//! One thread, one epoll. Links and flows that may have work stand in one queue and get a bounded turn each, so none
//! starves the others. Where one is slow, what feeds it is not read: memory is bounded by the rings of its flows.
#![forbid(unsafe_code)]

mod bucket;
mod bulk;
pub mod control;
mod denials;
mod dhcp;
mod dns;
mod flow;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod host;
mod icmp;
mod input;
mod link;
mod links;
mod opening;
pub mod policy;
mod server;
mod table;
mod tcp;
mod udp;
mod wire;

use std::{io, os::fd::AsFd};

pub use server::serve;

/// Why the net process cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed that never should.
    #[error("the net process cannot {doing}")]
    Io {
        /// What it was about to do.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The control socket failed.
    #[error("the net process lost its control socket")]
    Control(#[from] forkling_vmm::channel::Error),
}

impl Error {
    fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }
}

/// Serves the control socket on standard input until it is closed.
///
/// # Errors
/// Standard input is no such socket, epoll cannot be had, or the addresses of this host cannot be read: without them
/// a policy could not be kept.
pub fn run() -> Result<(), Error> {
    let control =
        io::stdin().as_fd().try_clone_to_owned().map_err(Error::io("duplicate its control socket"))?;
    serve(control)
}
