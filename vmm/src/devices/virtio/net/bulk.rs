//! The device's end of an arena: large packets by shared memory instead of the frame socket.
//!
//! The arena is made when the first large packet comes by, and forgotten when the other end has no use for it any more, so
//! an idle guest has none. A TAP takes no offers.

use std::{io, mem::MaybeUninit, os::fd::BorrowedFd};

use rustix::{
    io::Errno,
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, send, sendmsg},
};

use super::Chain;
use crate::{
    arena::{Arena, LARGE, Message, Way},
    memory::GuestRam,
    sys::frames,
};

const FLAGS: SendFlags = SendFlags::NOSIGNAL.union(SendFlags::DONTWAIT);

/// The arena, if there is one.
#[derive(Debug, Default)]
pub struct Bulk {
    arena: Option<Arena>,
    /// The other end takes none.
    refused: bool,
}

impl Bulk {
    /// Sends the packet of a chain through the arena. None: it has to go by the socket.
    ///
    /// # Errors
    /// `WouldBlock`: the socket takes no message now.
    pub fn send(&mut self, frames: BorrowedFd<'_>, ram: &GuestRam, chain: &Chain) -> Option<io::Result<()>> {
        let length = chain.readable_len();
        if length < LARGE || !self.offer(frames) {
            return None;
        }
        let arena = self.arena.as_ref()?;
        let message = arena.put(Way::ToNet, length, frames::slices(ram, chain.readable()))?;
        let sent = send(frames, &message.encode(), FLAGS);
        if sent.is_err() {
            arena.free(Way::ToNet, message);
        }
        Some(sent.map(drop).map_err(io::Error::from))
    }

    /// A packet of `length` bytes came by the socket: would there be an arena, it could have come through that.
    pub fn received(&mut self, frames: BorrowedFd<'_>, length: usize) {
        if length >= LARGE {
            self.offer(frames);
        }
    }

    /// Takes a message of the other end. The length of the packet it stands for, which is put at the beginning of `target`.
    pub fn hear(&mut self, message: [u8; Message::LEN], target: &mut [u8]) -> Option<usize> {
        match Message::decode(message) {
            Message::Packet { slot, length } => self.arena.as_ref()?.take(Way::ToGuest, slot, length, target),
            Message::Gone => {
                self.arena = None;
                None
            }
            Message::Refused => {
                *self = Self { arena: None, refused: true };
                None
            }
            Message::Offer => None,
        }
    }

    /// From now on there is no arena; what is in it is lost.
    pub fn forget(&mut self) {
        self.arena = None;
    }

    /// Makes an arena, if there is none, and passes it on. Whether there is one.
    fn offer(&mut self, frames: BorrowedFd<'_>) -> bool {
        if self.arena.is_none() && !self.refused {
            match Arena::new().map_err(|_| Errno::NOMEM).and_then(|arena| pass(frames, arena)) {
                Ok(arena) => self.arena = Some(arena),
                // No room, or no memory: perhaps next time.
                Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS | Errno::NOMEM) => {}
                Err(_) => self.refused = true,
            }
        }
        self.arena.is_some()
    }
}

fn pass(frames: BorrowedFd<'_>, arena: Arena) -> Result<Arena, Errno> {
    let memfd = [arena.memfd().ok_or(Errno::BADF)?];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&memfd));
    let message = Message::Offer.encode();
    sendmsg(frames, &[io::IoSlice::new(&message)], &mut ancillary, FLAGS)?;
    Ok(arena)
}
