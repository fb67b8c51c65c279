//! A descriptor chain, checked as a whole before any of it is used.

use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, Permissions};

use crate::memory::GuestRam;

/// One buffer of a chain: a range that lies in RAM.
#[derive(Clone, Copy, Debug)]
struct Segment {
    start: GuestAddress,
    len: usize,
}

/// A descriptor chain in RAM: device-readable buffers, then device-writable ones.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

/// The chain loops, is longer than its queue, leaves RAM, or has a readable buffer after a writable one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken;

impl Chain {
    /// Walks and checks `descriptors`; `limit` is the queue's size (virtio 1.2, 2.7.5.2 and 2.7.5.3.1).
    pub(super) fn new(
        descriptors: DescriptorChain<&GuestRam>,
        ram: &GuestRam,
        limit: u16,
    ) -> Result<Self, Broken> {
        let mut chain = Self { head: descriptors.head_index(), readable: Vec::new(), writable: Vec::new() };
        let mut complete = false;
        let mut count = 0;
        for descriptor in descriptors {
            count += 1;
            let (segment, access) = (
                Segment { start: descriptor.addr(), len: descriptor.len() as usize },
                if descriptor.is_write_only() { Permissions::Write } else { Permissions::Read },
            );
            let in_ram = segment.len == 0 || ram.check_range(segment.start, segment.len, access);
            let in_order = descriptor.is_write_only() || chain.writable.is_empty();
            if count > limit || !in_ram || !in_order {
                return Err(Broken);
            }
            if descriptor.is_write_only() { &mut chain.writable } else { &mut chain.readable }.push(segment);
            complete = !descriptor.has_next();
        }
        // The walk ends early, without an error, on a loop, a bad index or an unreadable table.
        if complete { Ok(chain) } else { Err(Broken) }
    }

    /// Index of the first descriptor, which names the chain in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes the device may read.
    pub fn readable_len(&self) -> usize {
        self.readable.iter().map(|segment| segment.len).sum()
    }

    /// Bytes the device may write.
    pub fn writable_len(&self) -> usize {
        self.writable.iter().map(|segment| segment.len).sum()
    }

    /// Where the readable part lies in guest memory: start and length of each piece.
    pub fn readable(&self) -> impl Iterator<Item = (GuestAddress, usize)> {
        self.readable.iter().map(|segment| (segment.start, segment.len))
    }

    /// Where the writable part lies.
    pub fn writable(&self) -> impl Iterator<Item = (GuestAddress, usize)> {
        self.writable.iter().map(|segment| (segment.start, segment.len))
    }

    /// Reads `data.len()` bytes from byte `offset` of the readable part. Errors: there are not so many.
    pub fn read(&self, ram: &GuestRam, offset: usize, data: &mut [u8]) -> Result<(), Broken> {
        copy(&self.readable, offset, data.len(), |at, range| ram.read_slice(&mut data[range], at))
    }

    /// Reads the first `data.len()` bytes of the writable part, which the device wrote. Errors: there are not so many.
    pub fn read_back(&self, ram: &GuestRam, data: &mut [u8]) -> Result<(), Broken> {
        copy(&self.writable, 0, data.len(), |at, range| ram.read_slice(&mut data[range], at))
    }

    /// Writes `data` at byte `offset` of the writable part. Errors: there is not so much room.
    pub fn write(&self, ram: &GuestRam, offset: usize, data: &[u8]) -> Result<(), Broken> {
        copy(&self.writable, offset, data.len(), |at, range| ram.write_slice(&data[range], at))
    }
}

/// Calls `access` for each piece of guest memory that bytes `offset..offset + len` of `segments` consist of.
fn copy(
    segments: &[Segment],
    offset: usize,
    len: usize,
    mut access: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Result<(), vm_memory::GuestMemoryError>,
) -> Result<(), Broken> {
    let (mut skip, mut done) = (offset, 0);
    for segment in segments {
        if done == len {
            break;
        }
        if skip >= segment.len {
            skip -= segment.len;
            continue;
        }
        let piece = (segment.len - skip).min(len - done);
        let at = segment.start.checked_add(skip as u64).ok_or(Broken)?;
        access(at, done..done + piece).map_err(|_| Broken)?;
        done += piece;
        skip = 0;
    }
    if done == len { Ok(()) } else { Err(Broken) }
}
