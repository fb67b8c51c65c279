//! Packets of a hostile guest, with host streams at the other ends.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use forkling_proto::rpc;
use vm_memory::{Bytes, GuestAddress};

use super::connection;
use super::dial::MAX_DIALS;
use super::packet::{GUEST_CID, HEADER_SIZE, HOST_CID, Header, STREAM, op};
use super::{EVENT, HostPorts, MAX_CONNECTIONS, MAX_RESETS, RX, SCRATCH, TX, Vsock};
use crate::devices::fuzzing::{
    BUFFERS, Input, MOST, RAM, check, describe, features, host, notify, offer, peek_u16, poke, pump, rings,
    start,
};
use crate::devices::testing::Host;
use crate::devices::virtio::mmio::registers::{NEEDS_RESET, STATUS};
use crate::memory::layout::Slot;
use crate::protocol::Opening;

/// Queue sizes: receive, transmit, event.
const SIZES: [u16; 3] = [MOST, MOST, 16];

/// Bytes of each transmit and receive buffer: half of the memory above the rings for both.
const BUFFER: u64 = (RAM as u64 - BUFFERS) / 2 / MOST as u64;
const RX_BUFFERS: u64 = BUFFERS + (RAM as u64 - BUFFERS) / 2;

/// Bytes of a large packet's data.
const BULK: u32 = 48 * 1024;

const OPERATIONS: usize = 400;
const STREAMS: usize = 16;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Questions for host ports, answered when the input says so.
#[derive(Debug)]
struct Asked(Arc<Mutex<VecDeque<u64>>>);

impl HostPorts for Asked {
    fn dial(&mut self, token: u64, port: u32) -> bool {
        // Some ports are nobody's.
        let known = !port.is_multiple_of(7);
        if known && let Ok(mut asked) = self.0.lock() {
            asked.push_back(token);
        }
        known
    }
}

/// A host port; one of them is the line's.
fn port(byte: u8) -> u32 {
    if byte == u8::MAX { rpc::PORT } else { byte.into() }
}

struct Guest {
    host: Host,
    streams: Vec<UnixStream>,
    asked: Arc<Mutex<VecDeque<u64>>>,
    /// Host ports the guest has heard of.
    ports: Vec<u32>,
    next: u16,
    seen: u16,
    event_idx: bool,
}

/// Does what `data` says: packets into the transmit queue, buffers into the others, and what happens to the host's streams.
///
/// # Panics
/// If the device does what none may, which is what the fuzzer looks for.
pub fn vsock(data: &[u8]) {
    let mut input = Input(data);
    let event_idx = input.u8() & 1 != 0;
    let mut guest = Guest {
        host: host(),
        streams: Vec::new(),
        asked: Arc::default(),
        ports: Vec::new(),
        next: 0,
        seen: 0,
        event_idx,
    };
    guest.restart();
    for _ in 0..OPERATIONS {
        if input.is_empty() {
            break;
        }
        guest.step(&mut input);
        pump(&mut guest.host);
        guest.check();
    }
}

impl Guest {
    fn restart(&mut self) {
        for queue in 0..3 {
            let [_, available, used] = rings(Slot::Vsock, queue);
            poke(&self.host, available, &[0; 4]);
            poke(&self.host, used, &[0; 4]);
        }
        self.seen = 0;
        start(&self.host, Slot::Vsock, features(self.event_idx), &SIZES);
        let ports = Box::new(Asked(self.asked.clone()));
        self.host.devices.with_vsock(|vsock| vsock.offer_ports(ports));
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.u8() % 14 {
            0..=3 => self.send(input),
            4 => self.receive_buffers(input),
            5 => self.connect(input),
            6 => self.host_side(input),
            7 => self.answer(input),
            8 => self.host.devices.cut(u32::from(input.u8()) % 4),
            9 => {
                let [table, ring, _] = rings(Slot::Vsock, EVENT as u16);
                describe(&self.host, table, 0, (BUFFERS, input.u8().into()), WRITE, 0);
                offer(&self.host, ring, SIZES[EVENT], 0, 1);
                notify(&self.host, Slot::Vsock, EVENT as u16);
            }
            10 => {
                let states = self.host.devices.save();
                if self.host.devices.rewind(&states).is_ok() {
                    self.host.devices.kick();
                }
            }
            11 => self.restart(),
            12 => {
                let at = u64::from(input.u16() % 0x3000);
                let len = input.u8() % 32;
                poke(&self.host, at, input.bytes(len.into()));
            }
            _ => self.host.devices.settle(),
        }
    }

    /// A packet, in as many descriptors as it is told.
    fn send(&mut self, input: &mut Input<'_>) {
        let (kind, operation) = (input.u8(), input.u8());
        let host_port = match kind & 3 {
            0 => port(input.u8()),
            _ => self.ports.get(usize::from(input.u8()) % self.ports.len().max(1)).copied().unwrap_or(9),
        };
        // The largest stands for more than an input could hold: what lies in memory from the first buffer on.
        let bulk = operation >> 4 == 15;
        let data = if bulk { &[][..] } else { input.bytes((operation >> 4) as usize * 32) };
        let header = Header {
            src_cid: if kind & 0x70 == 0x70 { input.u8().into() } else { GUEST_CID },
            dst_cid: HOST_CID,
            src_port: u32::from(kind >> 2 & 3),
            dst_port: host_port,
            len: match (kind & 0x80, bulk) {
                (0, false) => data.len() as u32,
                (0, true) => BULK,
                _ => input.u32(),
            },
            kind: if kind & 0x30 == 0x30 { input.u16() } else { STREAM },
            op: u16::from(operation & 15),
            flags: input.u8().into(),
            buf_alloc: if kind & 0x40 == 0 { 1 << 18 } else { input.u32() },
            fwd_cnt: if kind & 0x40 == 0 { 0 } else { input.u32() },
        };
        let packet = [&header.to_bytes()[..], data].concat();
        self.transmit(&packet, input.u8(), bulk);
    }

    fn transmit(&mut self, packet: &[u8], cut: u8, bulk: bool) {
        let [table, ring, _] = rings(Slot::Vsock, TX as u16);
        let head = self.next % MOST;
        let cut = usize::from(cut).min(packet.len());
        for (last, part) in [(false, &packet[..cut]), (true, &packet[cut..])] {
            let index = self.next % MOST;
            self.next = self.next.wrapping_add(1);
            let at = BUFFERS + u64::from(index) * BUFFER;
            poke(&self.host, at, part);
            let flags = if last { 0 } else { NEXT };
            let buffer = if bulk && last { (BUFFERS, BULK) } else { (at, part.len() as u32) };
            describe(&self.host, table, index, buffer, flags, (index + 1) % MOST);
        }
        offer(&self.host, ring, MOST, head, 1);
        notify(&self.host, Slot::Vsock, TX as u16);
    }

    fn receive_buffers(&mut self, input: &mut Input<'_>) {
        let [table, ring, _] = rings(Slot::Vsock, RX as u16);
        let (count, len) = (input.u8() % 32, input.u16());
        for index in 0..u16::from(count) {
            let at = RX_BUFFERS + u64::from(index) * BUFFER;
            let len = if len & 0x8000 == 0 { BUFFER as u32 } else { (len & 0x3FF).into() };
            describe(&self.host, table, index, (at, len), WRITE, 0);
            offer(&self.host, ring, MOST, index, 1);
        }
        notify(&self.host, Slot::Vsock, RX as u16);
    }

    fn stream(&mut self) -> Option<UnixStream> {
        let (ours, theirs) = UnixStream::pair().ok()?;
        ours.set_nonblocking(true).ok()?;
        if self.streams.len() == STREAMS {
            self.streams.remove(0);
        }
        self.streams.push(ours);
        Some(theirs)
    }

    fn connect(&mut self, input: &mut Input<'_>) {
        let (port, kind) = (input.u8() % 4, input.u8());
        let Some(stream) = self.stream() else { return };
        let opening = match kind % 3 {
            0 => Opening::Plain,
            1 => Opening::Announced,
            _ => Opening::Forwarded {
                group: u32::from(kind) % 4,
                first: input.bytes((kind >> 2).into()).to_vec(),
            },
        };
        let port = if port == 3 { rpc::PORT } else { port.into() };
        let _ = self.host.devices.connect(port, stream.into(), opening);
    }

    fn host_side(&mut self, input: &mut Input<'_>) {
        let (which, what) = (usize::from(input.u8()) % self.streams.len().max(1), input.u8());
        let Some(stream) = self.streams.get_mut(which) else { return };
        match what % 5 {
            0 => drop(stream.read(&mut [0; 8192])),
            1 => drop(self.streams.remove(which)),
            2 => drop(stream.shutdown(Shutdown::Write)),
            3 => drop(stream.shutdown(Shutdown::Read)),
            _ => drop(stream.write(&vec![what; usize::from(what) * 64])),
        }
    }

    fn answer(&mut self, input: &mut Input<'_>) {
        let token = self.asked.lock().ok().and_then(|mut asked| asked.pop_front());
        let stream = if input.u8() & 1 == 0 { self.stream() } else { None };
        self.host.devices.dialled(token.unwrap_or(1), stream.map(Into::into));
    }

    /// What holds for the device, and for all that it has told the guest.
    fn check(&mut self) {
        check(&self.host);
        self.host.devices.with_vsock(Vsock::check);
        if self.host.read(Slot::Vsock, STATUS) & NEEDS_RESET != 0 {
            self.restart();
            return;
        }
        let [_, _, used] = rings(Slot::Vsock, RX as u16);
        let done = peek_u16(&self.host, used + 2);
        // The input may have written over the ring.
        for _ in 0..done.wrapping_sub(self.seen).min(MOST) {
            self.take(used + 4 + u64::from(self.seen % MOST) * 8);
            self.seen = self.seen.wrapping_add(1);
        }
        self.seen = done;
    }

    fn take(&mut self, element: u64) {
        let index = peek_u16(&self.host, element);
        let at = RX_BUFFERS + u64::from(index) * BUFFER;
        let mut bytes = [0; HEADER_SIZE];
        if self.host.ram.read_slice(&mut bytes, GuestAddress(at)).is_err() {
            return;
        }
        let header = Header::from_bytes(&bytes);
        if header.op == op::REQUEST && self.ports.len() < 64 {
            self.ports.push(header.src_port);
        }
    }
}

impl Vsock {
    /// All that a guest can have waiting here is bounded.
    fn check(&mut self) {
        assert!(self.resets.len() <= MAX_RESETS + MAX_CONNECTIONS + MAX_DIALS);
        assert!(self.scratch.len() <= SCRATCH);
        assert!(self.news.len() <= 4 * MAX_CONNECTIONS);
        self.news.clear();
        assert!(self.dials.len() <= MAX_DIALS);
        for slot in 0..MAX_CONNECTIONS {
            if let Some(connection) = self.table.get(slot) {
                assert!(connection.room() <= connection::BUFFER as usize, "more is buffered than may be");
            }
        }
    }
}
