//! Entry points of the fuzz targets (`fuzz/`): bytes become what a hostile guest does to its devices.
//!
//! Guest memory lies between pages that cannot be touched, so that an access outside of it is a crash and not a guess.

use std::time::Duration;

use mio::Events;
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MmapRegion};

use super::testing::{DESC_LOW, Host, QUEUE_NUM, QUEUE_SEL};
use super::virtio::mmio::registers::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, EVENT_IDX, FEATURES_OK, NEEDS_RESET, QUEUE_NOTIFY, QUEUE_READY, STATUS,
    VERSION_1,
};
use crate::memory::GuestRam;
use crate::memory::layout::Slot;

mod mmio;
#[cfg(test)]
mod tests;

pub use super::virtio::vsock::fuzzing::vsock;
pub use mmio::mmio;

/// Guest memory in bytes: rings in the lower half, buffers in the upper one.
pub(crate) const RAM: usize = 128 * 1024;

/// Where the buffers begin.
pub(crate) const BUFFERS: u64 = 64 * 1024;

/// Bytes for the rings of a queue, of at most [`MOST`] entries.
const RINGS: u64 = 0x1000;
const AVAIL: u64 = 0x400;
const USED: u64 = 0x600;

/// Largest queue that fits in [`RINGS`].
pub(crate) const MOST: u16 = 64;

/// Turns of the event loop after which a guest that feeds itself is left alone.
const ROUNDS: usize = 8;

/// Bytes of a forbidden zone beside guest memory.
const ZONE: usize = 64 * 1024;

const KNOWN_STATUS: u32 = 0xFF & !48;

/// The bytes of a run, read from the front; zeros when there are no more.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let taken = self.bytes(N);
        array[..taken.len()].copy_from_slice(taken);
        array
    }

    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub fn slot(&mut self) -> Slot {
        Slot::ALL[usize::from(self.u8()) % Slot::ALL.len()]
    }
}

/// Zeroed memory between two forbidden zones.
fn guarded_ram() -> GuestRam {
    thread_local! {
        static MADE: (GuestRam, [MmapRegion<()>; 2]) = make_ram();
    }
    MADE.with(|(ram, _)| {
        ram.write_slice(&[0; RAM], GuestAddress(0)).expect("it is as long");
        ram.clone()
    })
}

fn make_ram() -> (GuestRam, [MmapRegion<()>; 2]) {
    let map = |size, access| {
        let flags = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        MmapRegion::build(None, size, access, flags).expect("the host has memory")
    };
    // The kernel maps downwards, but for holes, which what is kept fills.
    let mut kept = Vec::new();
    loop {
        let above = map(ZONE, libc::PROT_NONE);
        let ram = map(RAM, libc::PROT_READ | libc::PROT_WRITE);
        let below = map(ZONE, libc::PROT_NONE);
        let start = ram.as_ptr() as usize;
        if above.as_ptr() as usize == start + RAM && below.as_ptr() as usize + ZONE == start {
            let region = GuestRegionMmap::new(ram, GuestAddress(0)).expect("it fits below 2^64");
            return (GuestRam::from_regions(vec![region]).expect("one region"), [below, above]);
        }
        kept.push((above, ram, below));
        assert!(kept.len() < 1000, "no memory between forbidden zones can be had");
    }
}

/// A host whose guest has as little memory as possible.
pub(crate) fn host() -> Host {
    Host::over(guarded_ram())
}

/// Where the rings of a queue lie: descriptors, available ring, used ring.
pub(crate) fn rings(slot: Slot, queue: u16) -> [u64; 3] {
    let base = (slot as u64 * 4 + u64::from(queue) % 4) * RINGS;
    [base, base + AVAIL, base + USED]
}

/// Writes to guest memory, as far as there is some: a guest reaches nothing else.
pub(crate) fn poke(host: &Host, address: u64, bytes: &[u8]) {
    let _ = host.ram.write(bytes, GuestAddress(address));
}

pub(crate) fn peek_u16(host: &Host, address: u64) -> u16 {
    host.ram.read_obj(GuestAddress(address)).unwrap_or_default()
}

/// Takes a device through its initialisation, with these queues.
pub(crate) fn start(host: &Host, slot: Slot, features: u64, sizes: &[u16]) {
    host.write(slot, STATUS, 0);
    host.write(slot, STATUS, ACKNOWLEDGE);
    host.write(slot, STATUS, ACKNOWLEDGE | DRIVER);
    for (select, word) in [features as u32, (features >> 32) as u32].into_iter().enumerate() {
        host.write(slot, 0x24, select as u32);
        host.write(slot, 0x20, word);
    }
    host.write(slot, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    for (index, &size) in (0..).zip(sizes) {
        host.write(slot, QUEUE_SEL, index);
        host.write(slot, QUEUE_NUM, size.into());
        for (register, address) in (DESC_LOW..).step_by(0x10).zip(rings(slot, index as u16)) {
            host.write(slot, register, address as u32);
        }
        host.write(slot, QUEUE_READY, 1);
    }
    host.write(slot, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

/// What a driver of today accepts, without or with the event index.
pub(crate) fn features(event_idx: bool) -> u64 {
    VERSION_1 | if event_idx { EVENT_IDX } else { 0 }
}

/// Writes a descriptor.
pub(crate) fn describe(host: &Host, table: u64, index: u16, buffer: (u64, u32), flags: u16, next: u16) {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&buffer.0.to_le_bytes());
    bytes[8..12].copy_from_slice(&buffer.1.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    poke(host, table + u64::from(index) * 16, &bytes);
}

/// Puts a head into an available ring and moves its index by `step`.
pub(crate) fn offer(host: &Host, ring: u64, size: u16, head: u16, step: u16) {
    let index = peek_u16(host, ring + 2);
    poke(host, ring + 4 + u64::from(index % size) * 2, &head.to_le_bytes());
    poke(host, ring + 2, &index.wrapping_add(step).to_le_bytes());
}

/// Kicks.
pub(crate) fn notify(host: &Host, slot: Slot, queue: u16) {
    host.write(slot, QUEUE_NOTIFY, queue.into());
}

/// Runs the event loop until nothing is left to do, or the guest feeds itself.
pub(crate) fn pump(host: &mut Host) {
    let before = is_at_rest(host).then(|| content(host));
    let mut events = Events::with_capacity(64);
    for _ in 0..ROUNDS {
        host.poll.poll(&mut events, Some(Duration::ZERO)).expect("epoll");
        if events.is_empty() {
            break;
        }
        for event in &events {
            assert!(host.devices.on_event(event), "an event of nobody");
        }
    }
    if let Some(before) = before {
        assert!(before == content(host), "a device without a driver wrote to guest memory");
    }
}

fn content(host: &Host) -> Vec<u8> {
    let mut bytes = vec![0; RAM];
    host.ram.read_slice(&mut bytes, GuestAddress(0)).expect("it is as long");
    bytes
}

fn is_at_rest(host: &Host) -> bool {
    let running = |slot| host.read(slot, STATUS) & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK;
    !Slot::ALL.into_iter().any(running)
}

/// What holds for every device whatever its driver did.
pub(crate) fn check(host: &Host) {
    for slot in Slot::ALL {
        let status = host.read(slot, STATUS);
        assert_eq!(status & !KNOWN_STATUS, 0, "{slot:?} has an unknown status");
        assert_eq!(host.read(slot, 0), 0x7472_6976, "{slot:?} has lost its magic value");
    }
}
