//! The queues of a device while it works on them.

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError};

use super::{Chain, Violation};
use crate::memory::GuestRam;

/// Most chains taken in one pass, so that a driver that never stops adding cannot hold the event loop.
const BUDGET: u32 = 256;

/// Most queues a device has.
const MOST_QUEUES: usize = 4;

/// A device's view of its queues for the length of one pass.
#[derive(Debug)]
pub struct Queues<'a> {
    ram: &'a GuestRam,
    queues: &'a mut [Queue],
    used: u32,
    /// Where each queue's used ring stood before the pass.
    starts: [u16; MOST_QUEUES],
    /// Queues whose completions can wait to be heard of, one bit each, and how many of those were made.
    lazy: u32,
    completed_lazily: u32,
    budget: u32,
}

impl<'a> Queues<'a> {
    /// A pass over `queues`, at most [`MOST_QUEUES`]; `lazy` as in [`super::VirtioDevice::LAZY_QUEUES`].
    pub(super) fn new(ram: &'a GuestRam, queues: &'a mut [Queue], lazy: u32) -> Self {
        let mut starts = [0; MOST_QUEUES];
        starts.iter_mut().zip(&*queues).for_each(|(start, queue)| *start = queue.next_used());
        Self { ram, queues, used: 0, starts, lazy, completed_lazily: 0, budget: BUDGET }
    }

    /// Guest memory, to read and write chains.
    pub fn ram(&self) -> &'a GuestRam {
        self.ram
    }

    /// Takes the next chain of queue `index`. `None`: there is none now and the driver will kick when it adds one
    /// (or this pass took enough and goes on by itself).
    pub fn pop(&mut self, index: usize) -> Result<Option<Chain>, Violation> {
        let queue = &mut self.queues[index];
        if !queue.ready() || self.budget == 0 {
            return Ok(None);
        }
        loop {
            let next = queue.iter(self.ram).map_err(|_| Violation::Ring(index))?.next();
            if let Some(descriptors) = next {
                self.budget -= 1;
                let chain = Chain::new(descriptors, self.ram, queue.size());
                return chain.map(Some).map_err(|_| Violation::Chain(index));
            }
            let more = queue.enable_notification(self.ram).map_err(|_| Violation::Ring(index))?;
            if !more {
                return Ok(None);
            }
        }
    }

    /// Gives back, unused, the chain that [`Self::pop`] returned last for queue `index`.
    pub fn undo_pop(&mut self, index: usize) {
        self.queues[index].go_to_previous_position();
    }

    /// Completes `chain` of queue `index` with `len` bytes written into it.
    pub fn push_used(&mut self, index: usize, chain: &Chain, len: usize) -> Result<(), Violation> {
        let len = u32::try_from(len).map_err(|_| Violation::Chain(index))?;
        self.queues[index].add_used(self.ram, chain.head(), len).map_err(|_| Violation::Ring(index))?;
        self.used |= 1 << index;
        self.completed_lazily += self.lazy >> index & 1;
        Ok(())
    }

    /// Completes `parts`, chains of queue `index` with the bytes written into each, in one step: the driver sees none of
    /// them before all of them.
    pub fn push_used_together(&mut self, index: usize, parts: &[(Chain, usize)]) -> Result<(), Violation> {
        let Some(((last, last_len), others)) = parts.split_last() else { return Ok(()) };
        let ring = |_| Violation::Ring(index);
        let queue = &mut self.queues[index];
        let first = queue.next_used();
        for (offset, (chain, len)) in (0..).zip(others) {
            // A used ring element (virtio 1.2, 2.7.8): id and length.
            let slot = u64::from(first.wrapping_add(offset) % queue.size());
            let element = u64::from(chain.head()) | (*len as u64) << 32;
            let at =
                GuestAddress(queue.used_ring()).checked_add(4 + slot * 8).ok_or(Violation::Ring(index))?;
            self.ram.write_obj(element.to_le(), at).map_err(ring)?;
        }
        queue.set_next_used(first.wrapping_add(others.len() as u16));
        self.push_used(index, last, *last_len)
    }

    /// Position in the available ring of queue `index` up to which the driver has added chains.
    pub fn added(&self, index: usize) -> Result<u16, Violation> {
        let added = self.queues[index].avail_idx(self.ram, Ordering::Acquire);
        added.map(|position| position.0).map_err(|_| Violation::Ring(index))
    }

    /// Asks for a kick when the driver adds a chain to queue `index` at `position` or later, though chains from
    /// before are not taken yet. True: it has added one already.
    pub fn ask_kick(&mut self, index: usize, position: u16) -> Result<bool, Violation> {
        let queue = &mut self.queues[index];
        // The library only asks for a kick at the next chain it would take.
        let next = queue.next_avail();
        queue.set_next_avail(position);
        let added = queue.enable_notification(self.ram);
        queue.set_next_avail(next);
        added.map_err(|_| Violation::Ring(index))
    }

    /// Ends the pass: whether the driver wants an interrupt, and whether work was left for another pass. `owed` is how many
    /// completions the driver was to hear of before, and has not.
    pub(super) fn finish(self, mut owed: u32) -> Result<Outcome, Violation> {
        let mut interrupt = false;
        for (index, (queue, start)) in self.queues.iter().zip(self.starts).enumerate() {
            if self.used & (1 << index) == 0 {
                continue;
            }
            let wanted = wants_interrupt(queue, self.ram, start).map_err(|_| Violation::Ring(index))?;
            if self.lazy & (1 << index) == 0 {
                interrupt |= wanted;
            } else if wanted || owed > 0 {
                owed = owed.saturating_add(self.completed_lazily);
                // Long before a driver could wait for room; a chain has two descriptors or more.
                interrupt |= owed >= u32::from(queue.size() / 4);
            }
        }
        Ok(Outcome { interrupt, owed, unfinished: self.budget == 0 })
    }
}

/// Whether the driver wants to be told that the used ring has moved from `start` (virtio 1.2, 2.7.7.2). Not the library's,
/// which counts chains that were completed one by one.
fn wants_interrupt(queue: &Queue, ram: &GuestRam, start: u16) -> Result<bool, GuestMemoryError> {
    if !queue.event_idx_enabled() {
        return Ok(true);
    }
    // What was completed must be out before the driver's wish is read.
    fence(Ordering::SeqCst);
    let at = GuestAddress(queue.avail_ring()).unchecked_add(4 + u64::from(queue.size()) * 2);
    let wanted = u16::from_le(ram.load(at, Ordering::Relaxed)?);
    Ok(wanted.wrapping_sub(start) < queue.next_used().wrapping_sub(start))
}

/// How a pass ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    /// The driver wants to hear of completed chains.
    pub interrupt: bool,
    /// Without that, completions it can hear of later.
    pub owed: u32,
    /// The budget ran out.
    pub unfinished: bool,
}
