//! A control socket: packets of [`crate::protocol`] with file descriptors, blocking.

use std::{
    cell::RefCell,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use memmap2::MmapMut;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::{Serialize, de::DeserializeOwned};

use crate::protocol::{self, MAX_MESSAGE};

/// Most descriptors in one message.
pub const MAX_FDS: usize = 4;

/// Why a message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket failed.
    #[error("control socket failed")]
    Io(#[from] io::Error),
    /// The bytes are not a message.
    #[error(transparent)]
    Protocol(#[from] protocol::Error),
    /// The packet or its descriptors were cut off.
    #[error("control message was truncated; both sides must be of one build")]
    Truncated,
}

thread_local! {
    // One for all sockets of a thread, since a packet is decoded as soon as it is there. Only the pages that the longest
    // packet fills are ever touched: from the heap it might be memory used before, and be cleared as a whole.
    static BUFFER: RefCell<MmapMut> =
        RefCell::new(MmapMut::map_anon(MAX_MESSAGE).expect("the process can be given 64 KiB"));
}

/// One end of a control socket.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Over a connected `SOCK_SEQPACKET` socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Leaves the socket to its other holders: this end becomes /dev/null.
    pub fn detach(&mut self) -> io::Result<()> {
        let null = std::fs::File::open("/dev/null")?;
        Ok(rustix::io::dup2(&null, &mut self.socket)?)
    }

    /// Sends a message with descriptors.
    pub fn send<M: Serialize>(&self, message: &M, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        self.send_with(message, fds, SendFlags::NOSIGNAL)
    }

    /// Like [`Channel::send`] without descriptors, but fails with `WouldBlock` when the other side does not keep up.
    pub fn try_send<M: Serialize>(&self, message: &M) -> Result<(), Error> {
        self.send_with(message, &[], SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
    }

    fn send_with<M: Serialize>(
        &self,
        message: &M,
        fds: &[BorrowedFd<'_>],
        flags: SendFlags,
    ) -> Result<(), Error> {
        let bytes = protocol::encode(message)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)), "at most {MAX_FDS} descriptors");
        }
        let packet = [IoSlice::new(&bytes)];
        rustix::io::retry_on_intr(|| rustix::net::sendmsg(&self.socket, &packet, &mut ancillary, flags))
            .map_err(io::Error::from)?;
        Ok(())
    }

    /// Waits for a message or the other side's end, at most so long; whether it came.
    pub fn wait(&self, at_most: Duration) -> Result<bool, Error> {
        let at_most = Timespec { tv_sec: at_most.as_secs() as i64, tv_nsec: at_most.subsec_nanos().into() };
        let mut socket = [PollFd::new(&self.socket, PollFlags::IN)];
        let ready = rustix::io::retry_on_intr(|| rustix::event::poll(&mut socket, Some(&at_most)))
            .map_err(io::Error::from)?;
        Ok(ready > 0)
    }

    /// Receives a message with its descriptors; `None` when the other side is gone.
    pub fn receive<M: DeserializeOwned>(&self) -> Result<Option<(M, Vec<OwnedFd>)>, Error> {
        self.receive_with(RecvFlags::empty())
    }

    /// Like [`Channel::receive`], but fails with `WouldBlock` when no message is there.
    pub fn try_receive<M: DeserializeOwned>(&self) -> Result<Option<(M, Vec<OwnedFd>)>, Error> {
        self.receive_with(RecvFlags::DONTWAIT)
    }

    fn receive_with<M: DeserializeOwned>(
        &self,
        flags: RecvFlags,
    ) -> Result<Option<(M, Vec<OwnedFd>)>, Error> {
        BUFFER.with_borrow_mut(|bytes| self.receive_into(bytes, flags))
    }

    fn receive_into<M: DeserializeOwned>(
        &self,
        bytes: &mut [u8],
        flags: RecvFlags,
    ) -> Result<Option<(M, Vec<OwnedFd>)>, Error> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = rustix::io::retry_on_intr(|| {
            let mut packet = [IoSliceMut::new(bytes)];
            rustix::net::recvmsg(&self.socket, &mut packet, &mut ancillary, flags | RecvFlags::CMSG_CLOEXEC)
        })
        .map_err(io::Error::from)?;
        let fds = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(Error::Truncated);
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        Ok(Some((protocol::decode(&bytes[..received.bytes])?, fds)))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
