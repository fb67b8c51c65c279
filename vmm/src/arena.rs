//! Memory that both ends of a frame socket share, so that large packets pass without the kernel's copies.
//!
//! An arena is a sealed memfd with a few slots for each direction. Who sends a packet takes a free slot, fills it, and
//! sends a [`Message`] in its place on the socket, so packets keep their order. Who receives it copies the slot and frees
//! it. Where no slot is free, and for all that is small, the socket carries the packet itself.
//!
//! Neither end believes the other. Slots and lengths are checked, a slot is copied before it is looked at, and what a
//! slot's state says matters only to those two ends. A memfd that could shrink under its reader is not accepted.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicU32, Ordering},
};

use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, fstatfs, ftruncate, memfd_create,
};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

#[cfg(test)]
mod tests;

/// Slots for each direction: what the window of one connection fills, and some more.
const SLOTS: usize = 8;

/// Bytes of a slot: the longest packet, in whole pages.
const SLOT: usize = 17 * 4096;

/// Bytes before the first slot: a state for each.
const STATES: usize = 4096;

const SIZE: usize = STATES + 2 * SLOTS * SLOT;

/// Seals without which a memfd could be made shorter.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// File system type of a memfd of ordinary pages (statfs(2)); those of a memfd of large pages can run out.
const TMPFS: i64 = 0x0102_1994;

const FREE: u32 = 0;
const TAKEN: u32 = 1;

/// Bytes copied at a time. Beyond some 4 KiB the C library uses `rep movsb`, which many processors run slowly where
/// source and target are aligned differently, as they are here.
const PIECE: usize = 2048;

/// Shortest packet for which a slot is worth its while, in bytes.
pub const LARGE: usize = 16 * 1024;

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the guest's device.
    ToNet = 0,
    /// To the guest's device.
    ToGuest = 1,
}

/// What stands on the frame socket in a packet's place. No packet is as short as that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// A packet of so many bytes is in this slot.
    Packet {
        /// Which.
        slot: u32,
        /// In bytes.
        length: u32,
    },
    /// From the device, with the memfd as descriptor: this is the arena from now on.
    Offer,
    /// To the device: there is no arena any more; one may be offered when it is wanted.
    Gone,
    /// To the device: an offer was not accepted, and none will be.
    Refused,
}

/// Values of the first word that are no slot.
const OFFER: u32 = u32::MAX;
const GONE: u32 = u32::MAX - 1;
const REFUSED: u32 = u32::MAX - 2;

impl Message {
    /// Length in bytes.
    pub const LEN: usize = 8;

    /// As on the socket.
    pub fn encode(self) -> [u8; Self::LEN] {
        let (first, second) = match self {
            Self::Packet { slot, length } => (slot, length),
            Self::Offer => (OFFER, 0),
            Self::Gone => (GONE, 0),
            Self::Refused => (REFUSED, 0),
        };
        (u64::from(first) | u64::from(second) << 32).to_le_bytes()
    }

    /// Of bytes of the socket. A slot or length may still be impossible.
    pub fn decode(bytes: [u8; Self::LEN]) -> Self {
        let words = u64::from_le_bytes(bytes);
        match words as u32 {
            OFFER => Self::Offer,
            GONE => Self::Gone,
            REFUSED => Self::Refused,
            slot => Self::Packet { slot, length: (words >> 32) as u32 },
        }
    }
}

/// An arena, mapped.
#[derive(Debug)]
pub struct Arena {
    region: MmapRegion,
}

impl Arena {
    /// A new one. No memory is taken before slots are used.
    ///
    /// # Errors
    /// There are no descriptors or no address space left.
    pub fn new() -> io::Result<Self> {
        let memfd = memfd_create("frames", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&memfd, SIZE as u64)?;
        fcntl_add_seals(&memfd, SEALS)?;
        Self::map(memfd)
    }

    /// One that the other end has made.
    ///
    /// # Errors
    /// `InvalidInput`: it is none, or could be made shorter. Otherwise as [`Arena::new`].
    pub fn accept(memfd: OwnedFd) -> io::Result<Self> {
        let none = || io::Error::from(io::ErrorKind::InvalidInput);
        let seals = fcntl_get_seals(&memfd).map_err(|_| none())?;
        let stat = fstat(&memfd)?;
        if !seals.contains(SEALS) || stat.st_size != SIZE as i64 || fstatfs(&memfd)?.f_type != TMPFS {
            return Err(none());
        }
        Self::map(memfd)
    }

    fn map(memfd: OwnedFd) -> io::Result<Self> {
        let region = MmapRegion::from_file(FileOffset::new(File::from(memfd), 0), SIZE);
        Ok(Self { region: region.map_err(io::Error::other)? })
    }

    /// The memfd.
    pub fn memfd(&self) -> Option<BorrowedFd<'_>> {
        self.region.file_offset().map(|file| file.file().as_fd())
    }

    fn state(&self, way: Way, slot: usize) -> Option<&AtomicU32> {
        let at = (way as usize * SLOTS + slot) * size_of::<AtomicU32>();
        if slot < SLOTS { self.region.get_atomic_ref(at).ok() } else { None }
    }

    fn slot(&self, way: Way, slot: usize, length: usize) -> Option<VolatileSlice<'_>> {
        if slot >= SLOTS || length > SLOT {
            return None;
        }
        self.region.get_slice(STATES + (way as usize * SLOTS + slot) * SLOT, length).ok()
    }

    /// Takes a free slot for the consecutive `pieces` of a packet of `length` bytes, and fills it. None: no slot is free,
    /// or the pieces are not that long.
    pub fn put<'a>(
        &self,
        way: Way,
        length: usize,
        pieces: impl Iterator<Item = VolatileSlice<'a>>,
    ) -> Option<Message> {
        self.claim(way, length, |target| join(pieces, target))
    }

    /// The same for a packet of this process.
    pub fn put_bytes(&self, way: Way, packet: &[u8]) -> Option<Message> {
        self.claim(way, packet.len(), |target| {
            for (at, piece) in (0..).step_by(PIECE).zip(packet.chunks(PIECE)) {
                target.subslice(at, piece.len()).ok()?.copy_from(piece);
            }
            Some(packet.len())
        })
    }

    fn claim(
        &self,
        way: Way,
        length: usize,
        fill: impl FnOnce(&VolatileSlice<'_>) -> Option<usize>,
    ) -> Option<Message> {
        let take = |state: &AtomicU32| {
            state.compare_exchange(FREE, TAKEN, Ordering::Acquire, Ordering::Relaxed).is_ok()
        };
        let slot = (0..SLOTS).find(|&slot| self.state(way, slot).is_some_and(take))?;
        let message = Message::Packet { slot: slot as u32, length: length as u32 };
        if self.slot(way, slot, length).and_then(|target| fill(&target)) != Some(length) {
            self.free(way, message);
            return None;
        }
        Some(message)
    }

    /// Copies the packet of a message to the beginning of `target`, and frees its slot. None: there is no such slot, or no
    /// room.
    pub fn take(&self, way: Way, slot: u32, length: u32, target: &mut [u8]) -> Option<usize> {
        let length = length as usize;
        let source = self.slot(way, slot as usize, length)?;
        let target = target.get_mut(..length)?;
        join(std::iter::once(source), &VolatileSlice::from(target))?;
        self.state(way, slot as usize)?.store(FREE, Ordering::Release);
        Some(length)
    }

    /// Frees the slot of a message that was not sent.
    pub fn free(&self, way: Way, message: Message) {
        if let Message::Packet { slot, .. } = message
            && let Some(state) = self.state(way, slot as usize)
        {
            state.store(FREE, Ordering::Release);
        }
    }

    /// Whether no packet is on its way to the guest.
    pub fn is_idle(&self) -> bool {
        let free =
            |slot| self.state(Way::ToGuest, slot).is_none_or(|state| state.load(Ordering::Relaxed) == FREE);
        (0..SLOTS).all(free)
    }
}

/// Copies `pieces` into `target`, one after the other; their length together, if it is not more than the target's.
fn join<'a>(pieces: impl Iterator<Item = VolatileSlice<'a>>, target: &VolatileSlice<'_>) -> Option<usize> {
    let mut done = 0;
    for piece in pieces {
        for start in (0..piece.len()).step_by(PIECE) {
            let part = piece.subslice(start, PIECE.min(piece.len() - start)).ok()?;
            part.copy_to_volatile_slice(target.subslice(done, part.len()).ok()?);
            done += part.len();
        }
    }
    Some(done)
}
