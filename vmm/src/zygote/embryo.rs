//! The process of a fork before anybody has asked for it: it has copies of what forks write first, and no VM.

use std::{os::fd::OwnedFd, sync::Arc};

use super::{Zygote, fork::Error};
use crate::{
    channel::Channel,
    clock,
    protocol::{Stamps, ToFork},
    sys::process,
};

/// Waits in an embryo until it is to be a fork, and returns the wire of its NIC. `stamps` begin then.
pub fn wait(zygote: &Zygote, control: &Arc<Channel>, stamps: &mut Stamps) -> Result<Option<OwnedFd>, Error> {
    zygote.memory.copy_ahead(&zygote.first_pages.command);
    let frames = match control.receive()? {
        Some((ToFork::Begin, mut fds)) if fds.len() == usize::from(zygote.machine.has_nic()) => fds.pop(),
        // It is not wanted any more.
        _ => return Err(Error::DaemonGone),
    };
    let now = clock::monotonic_ns();
    *stamps = Stamps { requested: now, forked: now, ..Stamps::default() };
    process::set_name(process::NAME);
    Ok(frames)
}
