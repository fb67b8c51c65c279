//! Descriptors that the runtime waits for.

use std::{io, os::fd::OwnedFd};

use tokio::io::{Interest, unix::AsyncFd};

/// Has the runtime watch `fd`, which is non-blocking or never read and written.
#[expect(deprecated, reason = "unsound for types that lie about their descriptor; an OwnedFd cannot")]
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, interest)
}
