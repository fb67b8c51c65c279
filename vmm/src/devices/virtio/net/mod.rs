//! virtio-net (virtio 1.2, 5.1): frames between the guest and one descriptor.
//!
//! The descriptor takes and gives packets of a `virtio_net_hdr_v1` and an Ethernet frame: the frame socket to the net
//! process, or a TAP opened with IFF_VNET_HDR. The header passes unread: checksums and segmentation are left to whoever
//! is at the other end, which trusts it no more than the frame. The device knows no policy and no address.
//!
//! Large packets pass by memory shared with the other end instead, if it takes part in that (`bulk`).
//!
//! Unplugged, as in a rehearsal, the device takes the guest's frames and drops them, and hands in none.
//!
//! A TAP differs from the frame socket in two things: the kernel fills in checksums and cuts segments for a driver that
//! has not agreed to do so, and must be told; and what lies in it when the device is plugged in was meant for somebody
//! else, or for nobody, while the net process sends nothing to a guest that it was not told of.
//!
//! Work is done when the driver kicks and when the descriptor becomes ready (edge-triggered); a frame for which the guest
//! has no buffers waits here, the ones behind it wait in the descriptor.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use forkling_proto::network::{MTU, TEMPLATE_MAC};
use memmap2::MmapMut;
use mio::{Interest, Registry, Token, unix::SourceFd};
use rustix::io::Errno;

use super::{Chain, Queues, Violation, VirtioDevice, copy_config};
use crate::{
    arena::Message,
    devices::Error,
    memory::GuestRam,
    sys::{
        frames,
        tap::{self, Offloads},
    },
};
use bulk::Bulk;

mod bulk;
pub mod state;
#[cfg(test)]
mod tests;

pub use state::NetState;

const RX: usize = 0;
const TX: usize = 1;

/// `virtio_net_hdr_v1` (5.1.6): flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers.
const HEADER: usize = 12;
/// Byte offset of `num_buffers`.
const NUM_BUFFERS: usize = 10;
/// Shortest frame: an Ethernet header.
const MIN_FRAME: usize = 14;
/// Longest frame: an Ethernet header and the longest IP packet.
const MAX_FRAME: usize = 14 + 65_535;

/// Most frames that are dropped when the device is plugged in: more than a TAP's queue holds.
const MAX_DRAINED: usize = 4096;

/// Smallest MTU a driver can use (5.1.4.1).
const MIN_MTU: u16 = 68;

const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const HAS_MTU: u64 = 1 << 3;
const MAC: u64 = 1 << 5;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const MRG_RXBUF: u64 = 1 << 15;

/// Host side: where frames come from and go to. Its packets are those of the frame socket; it is used without blocking.
#[derive(Debug)]
pub struct Backend {
    /// The frame socket, or a TAP with all offloads on; set to non-blocking.
    pub frames: OwnedFd,
}

/// The network device.
#[derive(Debug)]
pub struct Net {
    frames: OwnedFd,
    /// What the kernel may leave to the driver, if the descriptor is a TAP.
    tap: Option<Offloads>,
    mtu: u16,
    plugged: bool,
    /// It was plugged before, so the descriptor may hold frames for a guest that is gone.
    used: bool,
    /// The descriptor may have a frame (true until a read finds none).
    readable: bool,
    /// A frame for which the guest had no buffers: header and frame.
    waiting: Vec<u8>,
    /// The part of a received packet that the guest's first buffer has no room for. Pages of it that no packet reaches
    /// are never touched: from the heap they might be memory used before, and be cleared.
    overflow: MmapMut,
    vectors: frames::Vectors,
    bulk: Bulk,
}

impl Net {
    /// A device after power-on, unplugged.
    pub fn new(backend: Backend) -> Self {
        Self {
            tap: tap::is_tap(backend.frames.as_fd()).then_some(Offloads::ALL),
            frames: backend.frames,
            mtu: MTU,
            plugged: false,
            used: false,
            readable: true,
            waiting: Vec::new(),
            overflow: MmapMut::map_anon(HEADER + MAX_FRAME).expect("the process can be given 64 KiB"),
            vectors: frames::Vectors::default(),
            bulk: Bulk::default(),
        }
    }

    /// Continues from a saved state, unplugged. Errors: an MTU that no driver takes.
    pub fn restore(state: &NetState, backend: Backend) -> Result<Self, Error> {
        let mut device = Self::new(backend);
        device.rewind(state)?;
        Ok(device)
    }

    /// Has epoll watch the descriptor.
    pub fn watch(&self, registry: &Registry, token: Token) -> io::Result<()> {
        let fd = self.frames.as_raw_fd();
        registry.register(&mut SourceFd(&fd), token, Interest::READABLE | Interest::WRITABLE)
    }

    /// From now on frames pass, those that come from now on.
    pub fn plug(&mut self) {
        if self.used || self.tap.is_some() {
            self.drain();
        }
        self.used = true;
        // What it holds is for a guest that is gone.
        self.bulk.forget();
        self.plugged = true;
        self.readable = true;
    }

    /// Takes what the descriptor holds, and throws it away. A sender that is faster than this is there now.
    fn drain(&self) {
        for _ in 0..MAX_DRAINED {
            // A shorter read takes a whole packet too; from a TAP with an error.
            match rustix::io::read(&self.frames, &mut [0; HEADER]) {
                Ok(1..) | Err(Errno::INTR | Errno::FAULT) => {}
                Ok(0) | Err(_) => return,
            }
        }
    }

    /// Touches what a plugged device touches when it looks for a frame's buffer, and leaves it as it is.
    pub fn look_for_buffer(queues: &mut Queues<'_>) -> Result<(), Violation> {
        if queues.pop(RX)?.is_some() {
            queues.undo_pop(RX);
        }
        Ok(())
    }

    /// The descriptor became ready.
    pub fn on_ready(&mut self, queues: &mut Queues<'_>, readable: bool) -> Result<(), Violation> {
        self.readable |= readable;
        self.process(queues)
    }

    /// Sends what the guest has queued, as far as the other end takes it.
    fn transmit(&mut self, queues: &mut Queues<'_>) -> Result<(), Violation> {
        while let Some(chain) = queues.pop(TX)? {
            let len = chain.readable_len();
            if !(HEADER + MIN_FRAME..=HEADER + MAX_FRAME).contains(&len) {
                return Err(Violation::Frame(len));
            }
            if self.plugged && self.send(queues.ram(), &chain) == Sent::Full {
                queues.undo_pop(TX);
                return Ok(());
            }
            queues.push_used(TX, &chain, 0)?;
        }
        Ok(())
    }

    fn send(&mut self, ram: &GuestRam, chain: &Chain) -> Sent {
        if let Some(sent) = self.bulk.send(self.frames.as_fd(), ram, chain) {
            let full = sent.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
            return if full { Sent::Full } else { Sent::Away };
        }
        loop {
            match frames::send(self.frames.as_fd(), ram, chain.readable(), &mut self.vectors) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Sent::Full,
                // A frame that the other end refuses, or an end that is gone: lost, as on any wire.
                Ok(_) | Err(_) => return Sent::Away,
            }
        }
    }

    /// Hands in what there is for the guest, as far as it has buffers.
    fn receive(&mut self, queues: &mut Queues<'_>) -> Result<(), Violation> {
        if !self.deliver_waiting(queues)? {
            return Ok(());
        }
        while self.plugged && self.readable && self.waiting.is_empty() {
            let Some(chain) = queues.pop(RX)? else { return Ok(()) };
            let room = chain.writable_len();
            if room < HEADER + MIN_FRAME {
                return Err(Violation::Short(RX));
            }
            let Some(len) = self.receive_into(queues.ram(), &chain) else {
                queues.undo_pop(RX);
                return Ok(());
            };
            if len == Message::LEN {
                if self.hear(queues, &chain)? {
                    continue;
                }
                return Ok(());
            }
            self.bulk.received(self.frames.as_fd(), len);
            if len <= room {
                finish_header(queues.ram(), &chain, 1)?;
                queues.push_used(RX, &chain, len)?;
            } else {
                self.spread(queues, chain, room, len)?;
            }
        }
        Ok(())
    }

    /// Takes a message that was read into `chain`, where the guest may have changed it: it can name no more than the other
    /// end could. False: the guest has no buffers for the packet it stands for.
    fn hear(&mut self, queues: &mut Queues<'_>, chain: &Chain) -> Result<bool, Violation> {
        let mut message = [0; Message::LEN];
        chain.read_back(queues.ram(), &mut message).map_err(|_| Violation::Chain(RX))?;
        queues.undo_pop(RX);
        match self.bulk.hear(message, &mut self.overflow) {
            Some(len) if len >= HEADER + MIN_FRAME => self.deliver(queues, len),
            _ => Ok(true),
        }
    }

    /// Reads a packet into `chain` and the overflow. `None`: there is none, or no sound one.
    fn receive_into(&mut self, ram: &GuestRam, chain: &Chain) -> Option<usize> {
        loop {
            let fd: BorrowedFd<'_> = self.frames.as_fd();
            match frames::receive(fd, ram, chain.writable(), &mut self.overflow, &mut self.vectors) {
                Ok(len) if (HEADER + MIN_FRAME..=HEADER + MAX_FRAME).contains(&len) => return Some(len),
                Ok(Message::LEN) => return Some(Message::LEN),
                // Not a frame; 0 is the end of the socket.
                Ok(len) if len > 0 => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => {
                    self.readable = false;
                    return None;
                }
            }
        }
    }

    /// Puts a packet of `len` bytes, which fills `first`, into further buffers. Its bytes from `base` on are in the
    /// overflow. All buffers are handed in at once: a driver that saw only some of them would take the packet for damaged
    /// (5.1.6.4).
    fn spread(
        &mut self,
        queues: &mut Queues<'_>,
        first: Chain,
        base: usize,
        len: usize,
    ) -> Result<(), Violation> {
        let room = first.writable_len();
        let mut parts = vec![(first, room)];
        let mut done = room;
        while done < len {
            let Some(chain) = queues.pop(RX)? else {
                self.keep(queues, &parts[0].0, base, len)?;
                parts.iter().for_each(|_| queues.undo_pop(RX));
                return Ok(());
            };
            let part = chain.writable_len().min(len - done);
            let start = done - base;
            let bytes = &self.overflow[start..start + part];
            if part == 0 || chain.write(queues.ram(), 0, bytes).is_err() {
                return Err(Violation::Short(RX));
            }
            parts.push((chain, part));
            done += part;
        }
        finish_header(queues.ram(), &parts[0].0, parts.len())?;
        queues.push_used_together(RX, &parts)
    }

    /// Keeps a packet of `len` bytes, of which the first `base` are in `first` and all others in the overflow, until there
    /// are buffers.
    fn keep(&mut self, queues: &Queues<'_>, first: &Chain, base: usize, len: usize) -> Result<(), Violation> {
        self.waiting.resize(base, 0);
        first.read_back(queues.ram(), &mut self.waiting).map_err(|_| Violation::Chain(RX))?;
        self.waiting.extend_from_slice(&self.overflow[..len - base]);
        Ok(())
    }

    /// Hands in the packet that waits. False: there are still not enough buffers.
    fn deliver_waiting(&mut self, queues: &mut Queues<'_>) -> Result<bool, Violation> {
        if self.waiting.is_empty() {
            return Ok(true);
        }
        let packet = std::mem::take(&mut self.waiting);
        self.overflow[..packet.len()].copy_from_slice(&packet);
        self.deliver(queues, packet.len())
    }

    /// Hands in the packet of `len` bytes at the beginning of the overflow. False: it waits for buffers.
    fn deliver(&mut self, queues: &mut Queues<'_>, len: usize) -> Result<bool, Violation> {
        let Some(first) = queues.pop(RX)? else {
            self.waiting.extend_from_slice(&self.overflow[..len]);
            return Ok(false);
        };
        let room = first.writable_len().min(len);
        if room < HEADER || first.write(queues.ram(), 0, &self.overflow[..room]).is_err() {
            return Err(Violation::Short(RX));
        }
        if room == len {
            finish_header(queues.ram(), &first, 1)?;
            queues.push_used(RX, &first, room)?;
            return Ok(true);
        }
        self.spread(queues, first, 0, len)?;
        Ok(self.waiting.is_empty())
    }
}

/// Whether a frame is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    Away,
    /// The other end takes no more now.
    Full,
}

/// Writes the number of buffers that a packet has, the one field that is the device's own business.
fn finish_header(ram: &GuestRam, first: &Chain, buffers: usize) -> Result<(), Violation> {
    let count = u16::try_from(buffers).map_err(|_| Violation::Chain(RX))?;
    first.write(ram, NUM_BUFFERS, &count.to_le_bytes()).map_err(|_| Violation::Short(RX))
}

impl VirtioDevice for Net {
    type State = NetState;

    const ID: u32 = 1;
    const QUEUE_SIZES: &'static [u16] = &[256, 256];

    fn features(&self) -> u64 {
        CSUM | GUEST_CSUM | HAS_MTU | MAC | GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6 | MRG_RXBUF
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // mac, status, max_virtqueue_pairs, mtu (5.1.4)
        let mut config = [0; 12];
        config[..6].copy_from_slice(&TEMPLATE_MAC);
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.to_le_bytes());
        copy_config(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, _data: &[u8]) -> Result<(), Violation> {
        Err(Violation::Config(offset))
    }

    fn activate(&mut self) {}

    fn agreed(&mut self, features: u64) {
        let has = |feature| features & feature != 0;
        let checksum = has(GUEST_CSUM);
        let wanted =
            Offloads { checksum, tso4: checksum && has(GUEST_TSO4), tso6: checksum && has(GUEST_TSO6) };
        if self.tap.is_none_or(|set| set == wanted) {
            return;
        }
        match tap::set_offloads(self.frames.as_fd(), wanted) {
            Ok(()) => self.tap = Some(wanted),
            Err(error) => tracing::warn!(%error, "the TAP does not take the driver's offloads"),
        }
    }

    fn reset(&mut self) {
        self.waiting.clear();
    }

    fn process(&mut self, queues: &mut Queues<'_>) -> Result<(), Violation> {
        self.transmit(queues)?;
        self.receive(queues)
    }

    fn save(&self) -> NetState {
        // What waits is a frame on its way, and lost like those in the descriptor.
        let Self {
            frames: _,
            tap: _,
            mtu,
            plugged: _,
            used: _,
            readable: _,
            waiting: _,
            overflow: _,
            vectors: _,
            bulk: _,
        } = self;
        NetState { mtu: *mtu }
    }

    fn rewind(&mut self, state: &NetState) -> Result<(), Error> {
        let NetState { mtu } = *state;
        if mtu < MIN_MTU {
            return Err(Error::Field { device: "net", field: "mtu" });
        }
        self.mtu = mtu;
        self.plugged = false;
        Ok(())
    }
}
