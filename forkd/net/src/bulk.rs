//! Large packets of a link, by an arena that its guest's device has offered.

use std::{
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use forkling_vmm::arena::{Arena, LARGE, Message, Way};
use rustix::{
    io::Errno,
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send},
};

const FLAGS: SendFlags = SendFlags::NOSIGNAL.union(SendFlags::DONTWAIT);

/// How long an arena is kept that nothing passes through.
const IDLE: Duration = Duration::from_secs(2);

/// The arena of a link, if there is one.
#[derive(Debug, Default)]
pub struct Bulk {
    arena: Option<Arena>,
    /// Something has passed through it since [`Bulk::rest`] last looked.
    used: bool,
    /// When that looks again.
    rest: Option<Instant>,
}

impl Bulk {
    /// Reads a packet into `buffer`, from the socket or the arena. Its whole length, 0 for the end; none: there was a
    /// message and no packet.
    ///
    /// # Errors
    /// Those of recvmsg(2).
    pub fn receive(
        &mut self,
        frames: BorrowedFd<'_>,
        buffer: &mut [u8],
        now: Instant,
    ) -> Result<Option<usize>, Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::TRUNC | RecvFlags::CMSG_CLOEXEC;
        let length = recvmsg(frames, &mut [IoSliceMut::new(buffer)], &mut ancillary, flags)?.bytes;
        let Some(&message) = buffer.first_chunk().filter(|_| length == Message::LEN) else {
            return Ok(Some(length));
        };
        match Message::decode(message) {
            Message::Packet { slot, length } => return Ok(self.take(frames, slot, length, buffer)),
            Message::Offer => self.accept(frames, descriptor(&mut ancillary), now),
            // Never sent here; a guest's device that does is its own enemy.
            Message::Gone | Message::Refused => {}
        }
        Ok(None)
    }

    fn take(&mut self, frames: BorrowedFd<'_>, slot: u32, length: u32, buffer: &mut [u8]) -> Option<usize> {
        let Some(arena) = &self.arena else {
            // What was in it is lost, as on any wire.
            tell(frames, Message::Gone);
            return None;
        };
        self.used = true;
        arena.take(Way::ToNet, slot, length, buffer)
    }

    fn accept(&mut self, frames: BorrowedFd<'_>, memfd: Option<OwnedFd>, now: Instant) {
        let none = || io::Error::from(io::ErrorKind::InvalidInput);
        match memfd.ok_or_else(none).and_then(Arena::accept) {
            Ok(arena) => {
                let rest = self.rest.filter(|&at| at > now);
                *self = Self { arena: Some(arena), used: true, rest };
            }
            Err(error) => {
                tracing::debug!(%error, "a guest's shared memory is not accepted");
                tell(frames, Message::Refused);
            }
        }
    }

    /// Sends a packet, without waiting.
    ///
    /// # Errors
    /// Those of send(2).
    pub fn send(&mut self, frames: BorrowedFd<'_>, packet: &[u8]) -> Result<(), Errno> {
        if packet.len() >= LARGE
            && let Some(arena) = &self.arena
            && let Some(message) = arena.put_bytes(Way::ToGuest, packet)
        {
            self.used = true;
            let sent = send(frames, &message.encode(), FLAGS);
            if sent.is_err() {
                arena.free(Way::ToGuest, message);
            }
            return sent.map(drop);
        }
        send(frames, packet, FLAGS).map(drop)
    }

    /// The arena is of no use any more.
    pub fn forget(&mut self) {
        self.arena = None;
    }

    /// Gives the arena up if nothing has passed through it for a while. When to ask again, if that has not been said
    /// before.
    pub fn rest(&mut self, frames: BorrowedFd<'_>, now: Instant) -> Option<Instant> {
        let arena = self.arena.as_ref()?;
        if self.rest.is_some_and(|at| at > now) {
            return None;
        }
        if self.rest.is_some() && !std::mem::take(&mut self.used) && arena.is_idle() {
            tell(frames, Message::Gone);
            *self = Self::default();
            return None;
        }
        self.rest = Some(now + IDLE);
        self.rest
    }
}

fn descriptor(ancillary: &mut RecvAncillaryBuffer<'_>) -> Option<OwnedFd> {
    ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    })
}

/// Where there is no room for a message, the next packet for which there is no arena brings it again.
fn tell(frames: BorrowedFd<'_>, message: Message) {
    let _ = send(frames, &message.encode(), FLAGS);
}

#[cfg(test)]
mod tests;
