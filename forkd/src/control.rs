//! Control sockets: one packet is one message of [`forkling_vmm::protocol`], with the descriptors it names.

use std::{
    cell::RefCell,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use forkling_vmm::protocol::{self, MAX_MESSAGE};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{Interest, unix::AsyncFd};

use crate::reactor::watch;

/// Most descriptors in one message.
const MAX_FDS: usize = 8;

/// Why a message did not pass.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket failed; the peer is gone or the host is out of buffers.
    #[error("control socket: {0}")]
    Io(#[from] io::Error),
    /// The packet is not a message.
    #[error(transparent)]
    Protocol(#[from] protocol::Error),
    /// The packet was longer than a message can be.
    #[error("control packet longer than {MAX_MESSAGE} bytes; both sides must be of one build")]
    Truncated,
}

/// The daemon's end of a control socket.
#[derive(Debug)]
pub struct Socket(AsyncFd<OwnedFd>);

thread_local! {
    // Packets are received and decoded without a pause in between, so one buffer serves every socket of a thread.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; MAX_MESSAGE]);
}

/// A new pair: the daemon's end, and the peer's, which blocks.
pub fn pair() -> io::Result<(Socket, OwnedFd)> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok((Socket(watch(ours, Interest::READABLE | Interest::WRITABLE)?), theirs))
}

impl Socket {
    /// Sends one message; waits only when the peer's buffer is full.
    pub async fn send<M: Serialize>(&self, message: &M, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let bytes = protocol::encode(message)?;
        match send_packet(self.0.get_ref().as_fd(), &bytes, fds) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            done => return Ok(done?),
        }
        Ok(self.0.async_io(Interest::WRITABLE, |fd| send_packet(fd.as_fd(), &bytes, fds)).await?)
    }

    /// The next message with its descriptors; `None` when the peer closed its end.
    pub async fn receive<M: DeserializeOwned>(&self) -> Result<Option<(M, Vec<OwnedFd>)>, Error> {
        self.0.async_io(Interest::READABLE, |fd| settle(receive_packet(fd.as_fd()))).await?
    }

    /// As [`Self::receive`], without waiting: `None` also when nothing is there.
    pub fn try_receive<M: DeserializeOwned>(&self) -> Result<Option<(M, Vec<OwnedFd>)>, Error> {
        match receive_packet(self.0.get_ref().as_fd()) {
            Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            done => done,
        }
    }
}

/// Splits "try again" from outcomes, as `async_io` wants it.
fn settle<T>(outcome: Result<T, Error>) -> io::Result<Result<T, Error>> {
    match outcome {
        Err(Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => Err(error),
        done => Ok(done),
    }
}

fn send_packet(fd: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "no message has more than {MAX_FDS}");
    }
    sendmsg(fd, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive_packet<M: DeserializeOwned>(fd: BorrowedFd<'_>) -> Result<Option<(M, Vec<OwnedFd>)>, Error> {
    BUFFER.with_borrow_mut(|buffer| {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let message = recvmsg(fd, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)
            .map_err(io::Error::from)?;
        if message.flags.contains(ReturnFlags::TRUNC) {
            return Err(Error::Truncated);
        }
        let mut fds = Vec::new();
        for ancillary in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = ancillary {
                fds.extend(received);
            }
        }
        // No message encodes to nothing, so an empty packet is the end of the stream.
        if message.bytes == 0 {
            return Ok(None);
        }
        Ok(Some((protocol::decode(&buffer[..message.bytes])?, fds)))
    })
}

#[cfg(test)]
mod tests;
