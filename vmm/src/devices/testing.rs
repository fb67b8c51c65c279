//! Test support: a machine's side of the devices (RAM, event loop) and a driver that talks to them through registers.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use mio::{Events, Poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use vm_memory::{Bytes, GuestAddress};

use super::virtio::mmio::registers::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, EVENT_IDX, FEATURES_OK, QUEUE_NOTIFY, QUEUE_READY, STATUS, VERSION_1,
};
use super::virtio::{net, pmem};
use super::{Backends, DeviceConfig, DeviceStates, Devices, Error, serial};
use crate::memory::GuestRam;
use crate::memory::layout::{PMEM_ALIGN, Slot};

pub const RAM_SIZE: u64 = 32 << 20;
pub const DESC_LOW: u64 = 0x80;
pub const AVAIL_LOW: u64 = 0x90;
pub const USED_LOW: u64 = 0xA0;
pub const QUEUE_SEL: u64 = 0x30;
pub const QUEUE_NUM: u64 = 0x38;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Every descriptor of a test queue has a buffer of this size of its own.
pub const BUFFER: u64 = 8192;

pub fn ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), RAM_SIZE as usize)]).unwrap()
}

/// RAM, an event loop and the devices.
pub struct Host {
    pub poll: Poll,
    pub ram: GuestRam,
    pub devices: Devices,
    /// The other end of the NIC's wire.
    pub wire: OwnedFd,
}

/// A wire: the device's end and the other.
fn wire() -> (net::Backend, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (frames, other) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    (net::Backend { frames }, other)
}

pub fn backends(poll: &Poll) -> Backends {
    Backends {
        registry: poll.registry().try_clone().unwrap(),
        console: serial::Backend::default(),
        pmem: Some(pmem::Backend { size: PMEM_ALIGN }),
        net: Some(wire().0),
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

impl Host {
    pub fn new() -> Self {
        Self::over(ram())
    }

    /// With this RAM.
    pub fn over(ram: GuestRam) -> Self {
        let poll = Poll::new().unwrap();
        let (net, wire) = wire();
        let backends = Backends { net: Some(net), ..backends(&poll) };
        let config = DeviceConfig { pmem: true, net: true };
        let devices = Devices::new(&config, backends, ram.clone()).unwrap();
        Self { poll, ram, devices, wire }
    }

    /// A fork: the same RAM content, devices restored from `states`.
    pub fn fork(&self, states: &DeviceStates) -> Result<Self, Error> {
        let mut content = vec![0; RAM_SIZE as usize];
        self.ram.read_slice(&mut content, GuestAddress(0)).unwrap();
        let (poll, ram) = (Poll::new().unwrap(), ram());
        ram.write_slice(&content, GuestAddress(0)).unwrap();
        let (net, wire) = wire();
        let backends = Backends { net: Some(net), ..backends(&poll) };
        let devices = Devices::restore(states, backends, ram.clone())?;
        Ok(Self { poll, ram, devices, wire })
    }

    /// Whether devices in `states` would be accepted with this RAM.
    pub fn restores(&self, states: &DeviceStates) -> bool {
        Devices::restore(states, backends(&self.poll), self.ram.clone()).is_ok()
    }

    /// Runs the event loop until nothing is left to do.
    pub fn pump(&mut self) {
        let mut events = Events::with_capacity(64);
        loop {
            self.poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
            if events.is_empty() {
                return;
            }
            for event in &events {
                assert!(self.devices.on_event(event));
            }
        }
    }

    /// Interrupts raised on a slot's line since the last look.
    pub fn interrupts(&self, slot: Slot) -> u64 {
        let line = self.devices.interrupts().find(|&(gsi, _)| gsi == slot.gsi());
        line.unwrap().1.read().unwrap_or(0)
    }

    pub fn read(&self, slot: Slot, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.devices.mmio_read(slot.mmio_base() + offset, &mut word);
        u32::from_le_bytes(word)
    }

    pub fn write(&self, slot: Slot, offset: u64, value: u32) {
        self.devices.mmio_write(slot.mmio_base() + offset, &value.to_le_bytes());
    }
}

/// The driver's side of one queue. Usable after a fork too, since all it holds is positions.
#[derive(Clone)]
pub struct DriverQueue {
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    buffers: u64,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<(u16, u32, bool)>>,
    added: u16,
    kicked: u16,
    seen: u16,
}

/// A driver of the device in `slot`.
#[derive(Clone)]
pub struct Driver {
    pub slot: Slot,
    pub queues: Vec<DriverQueue>,
}

impl Driver {
    /// Takes the device through its whole initialisation.
    pub fn start(host: &Host, slot: Slot, sizes: &[u16]) -> Self {
        let driver = Self::prepared(host, slot, sizes);
        for (index, _) in driver.queues.iter().enumerate() {
            driver.set_up(host, index);
        }
        host.write(slot, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert_eq!(host.read(slot, STATUS), 15);
        driver
    }

    /// As far as FEATURES_OK.
    pub fn prepared(host: &Host, slot: Slot, sizes: &[u16]) -> Self {
        host.write(slot, STATUS, ACKNOWLEDGE);
        host.write(slot, STATUS, ACKNOWLEDGE | DRIVER);
        let features = EVENT_IDX | VERSION_1;
        host.write(slot, 0x24, 0);
        host.write(slot, 0x20, features as u32);
        host.write(slot, 0x24, 1);
        host.write(slot, 0x20, (features >> 32) as u32);
        host.write(slot, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(host.read(slot, STATUS), 11);
        let base = 0x10_0000 + (slot as u64) * 0x80_0000;
        let queue = |(index, &size): (usize, &u16)| {
            let at = base + index as u64 * 0x28_0000;
            DriverQueue {
                size,
                desc: at,
                avail: at + 0x2000,
                used: at + 0x4000,
                buffers: at + 0x1_0000,
                free: (0..size).rev().collect(),
                chains: HashMap::new(),
                added: 0,
                kicked: 0,
                seen: 0,
            }
        };
        Self { slot, queues: sizes.iter().enumerate().map(queue).collect() }
    }

    pub fn set_up(&self, host: &Host, index: usize) {
        let queue = &self.queues[index];
        host.write(self.slot, QUEUE_SEL, index as u32);
        host.write(self.slot, QUEUE_NUM, queue.size.into());
        for (register, address) in [(DESC_LOW, queue.desc), (AVAIL_LOW, queue.avail), (USED_LOW, queue.used)]
        {
            host.write(self.slot, register, address as u32);
            host.write(self.slot, register + 4, (address >> 32) as u32);
        }
        host.write(self.slot, QUEUE_READY, 1);
    }

    /// Kicks if the device asked for it (virtio 1.2, 2.7.10.1), so that a kick it forgot to ask for is missed.
    pub fn kick(&mut self, host: &Host, index: usize) {
        if self.has_to_kick(&host.ram, index) {
            self.force_kick(host, index);
        }
    }

    /// Whether the device asked to be kicked for what was added since this was last called.
    pub fn has_to_kick(&mut self, ram: &GuestRam, index: usize) -> bool {
        let queue = &mut self.queues[index];
        // The new position must be out before the device's wish is read.
        fence(Ordering::SeqCst);
        let avail_event = queue.used + 4 + u64::from(queue.size) * 8;
        let asked: u16 = ram.load(GuestAddress(avail_event), Ordering::Acquire).unwrap();
        let since = queue.added.wrapping_sub(std::mem::replace(&mut queue.kicked, queue.added));
        queue.added.wrapping_sub(asked).wrapping_sub(1) < since
    }

    /// Kicks whether the device asked for it or not.
    pub fn force_kick(&self, host: &Host, index: usize) {
        host.devices.mmio_write(self.slot.mmio_base() + QUEUE_NOTIFY, &(index as u32).to_le_bytes());
    }
}

impl DriverQueue {
    pub fn has_room(&self, descriptors: usize) -> bool {
        self.free.len() >= descriptors
    }

    /// Adds a chain of buffers to read (with content) and to write (with length).
    pub fn add(&mut self, ram: &GuestRam, readable: &[&[u8]], writable: &[u32]) -> u16 {
        let parts = readable.iter().map(|data| (data.len() as u32, false));
        let parts: Vec<_> = parts.chain(writable.iter().map(|&len| (len, true))).collect();
        let parts: Vec<_> =
            parts.into_iter().map(|(len, write)| (self.free.pop().unwrap(), len, write)).collect();
        for (position, &(index, len, write)) in parts.iter().enumerate() {
            assert!(u64::from(len) <= BUFFER);
            let next = parts.get(position + 1).map(|part| part.0);
            let flags = if write { WRITE } else { 0 } | next.map_or(0, |_| NEXT);
            let address = self.buffers + u64::from(index) * BUFFER;
            if !write {
                ram.write_slice(readable[position], GuestAddress(address)).unwrap();
            }
            self.describe(ram, index, Descriptor::new(address, len, flags, next.unwrap_or(0)));
        }
        let head = parts[0].0;
        self.chains.insert(head, parts);
        self.offer(ram, head);
        head
    }

    /// Writes a descriptor as it is.
    pub fn describe(&self, ram: &GuestRam, index: u16, descriptor: Descriptor) {
        let at = GuestAddress(self.desc + u64::from(index) * 16);
        ram.write_obj(RawDescriptor::from(descriptor), at).unwrap();
    }

    /// Puts a head into the available ring.
    pub fn offer(&mut self, ram: &GuestRam, head: u16) {
        let at = self.avail + 4 + u64::from(self.added % self.size) * 2;
        ram.write_obj(head, GuestAddress(at)).unwrap();
        self.added = self.added.wrapping_add(1);
        ram.store(self.added, GuestAddress(self.avail + 2), Ordering::Release).unwrap();
    }

    /// Takes a completed chain: its head and the bytes written into it.
    pub fn take(&mut self, ram: &GuestRam) -> Option<(u16, Vec<u8>)> {
        let done: u16 = ram.load(GuestAddress(self.used + 2), Ordering::Acquire).unwrap();
        if done == self.seen {
            return None;
        }
        let at = self.used + 4 + u64::from(self.seen % self.size) * 8;
        let (head, len): (u32, u32) =
            (ram.read_obj(GuestAddress(at)).unwrap(), ram.read_obj(GuestAddress(at + 4)).unwrap());
        self.seen = self.seen.wrapping_add(1);
        // used_event: interrupt at the next completion.
        ram.write_obj(self.seen, GuestAddress(self.avail + 4 + u64::from(self.size) * 2)).unwrap();
        let (mut data, mut left) = (Vec::new(), len);
        for (index, size, write) in self.chains.remove(&(head as u16)).unwrap() {
            if write {
                let mut part = vec![0; left.min(size) as usize];
                let address = self.buffers + u64::from(index) * BUFFER;
                ram.read_slice(&mut part, GuestAddress(address)).unwrap();
                left -= part.len() as u32;
                data.extend(part);
            }
            self.free.push(index);
        }
        Some((head as u16, data))
    }
}
