//! The guest's side of vsock, packet by packet.

use std::os::unix::net::UnixStream;

use super::super::packet::{GUEST_CID, HEADER_SIZE, HOST_CID, Header, STREAM, op};
use super::super::{EVENT, RX, TX};
use crate::devices::testing::{Driver, Host};
use crate::memory::layout::Slot;
use crate::protocol::Opening;

const SIZES: [u16; 3] = [256, 256, 16];

/// Room for data in a receive buffer, as in Linux.
pub const RECEIVE: u32 = 4096;

/// A header from the guest with ample credit.
pub fn header(op: u16) -> Header {
    Header {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        kind: STREAM,
        op,
        buf_alloc: 1 << 20,
        ..Header::default()
    }
}

pub struct Guest {
    pub host: Host,
    pub driver: Driver,
    /// Credit that [`Self::answer`] tells.
    pub buffer: u32,
    pub forwarded: u32,
}

impl Guest {
    pub fn new() -> Self {
        Self::on(Host::new())
    }

    /// A guest with receive and event buffers.
    pub fn on(host: Host) -> Self {
        let mut guest = Self::without_buffers(host);
        guest.refill();
        for _ in 0..8 {
            guest.driver.queues[EVENT].add(&guest.host.ram, &[], &[4]);
        }
        guest.driver.kick(&guest.host, EVENT);
        guest.host.pump();
        guest
    }

    /// A fork of it, as the zygote makes it.
    pub fn fork(&self) -> Self {
        let host = self.host.fork(&self.host.devices.save()).unwrap();
        host.devices.kick();
        Self { host, driver: self.driver.clone(), buffer: self.buffer, forwarded: 0 }
    }

    /// A guest that has no receive buffers yet.
    pub fn starved() -> Self {
        Self::without_buffers(Host::new())
    }

    fn without_buffers(host: Host) -> Self {
        let driver = Driver::start(&host, Slot::Vsock, &SIZES);
        Self { host, driver, buffer: 1 << 20, forwarded: 0 }
    }

    /// Gives the device all receive buffers there are; every other one is a single descriptor, as in newer kernels.
    pub fn refill(&mut self) {
        let queue = &mut self.driver.queues[RX];
        while queue.has_room(2) {
            queue.add(&self.host.ram, &[], &[HEADER_SIZE as u32, RECEIVE]);
            if queue.has_room(1) {
                queue.add(&self.host.ram, &[], &[HEADER_SIZE as u32 + RECEIVE]);
            }
        }
        self.driver.kick(&self.host, RX);
    }

    /// Next packet for the guest.
    pub fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        self.host.pump();
        let (_, packet) = self.driver.queues[RX].take(&self.host.ram)?;
        self.refill();
        let (head, data) = packet.split_first_chunk().unwrap();
        let header = Header::from_bytes(head);
        assert_eq!(header.len as usize, data.len());
        Some((header, data.to_vec()))
    }

    /// Sends a packet; its length is that of `data`.
    pub fn send(&mut self, header: Header, data: &[u8]) {
        self.send_raw(Header { len: data.len() as u32, ..header }, data);
    }

    /// Sends a packet as it is, in one to three descriptors depending on its length.
    pub fn send_raw(&mut self, header: Header, data: &[u8]) {
        let bytes = header.to_bytes();
        let (first, second) = data.split_at(data.len() / 3);
        let whole = [&bytes[..], data].concat();
        let queue = &mut self.driver.queues[TX];
        match data.len() % 3 {
            _ if data.is_empty() => queue.add(&self.host.ram, &[&bytes], &[]),
            0 => queue.add(&self.host.ram, &[&whole], &[]),
            1 => queue.add(&self.host.ram, &[&bytes, data], &[]),
            _ => queue.add(&self.host.ram, &[&bytes, first, second], &[]),
        };
        self.driver.kick(&self.host, TX);
        self.host.pump();
        while self.driver.queues[TX].take(&self.host.ram).is_some() {}
    }

    /// Sends a packet on the connection that `request` asked for.
    pub fn answer(&mut self, request: &Header, op: u16, flags: u32, data: &[u8]) {
        let header = Header {
            src_port: request.dst_port,
            dst_port: request.src_port,
            flags,
            buf_alloc: self.buffer,
            fwd_cnt: self.forwarded,
            ..header(op)
        };
        self.send(header, data);
    }

    /// Has the host connect to `port` and accepts. The host's end and the request.
    pub fn accept(&mut self, port: u32) -> (UnixStream, Header) {
        let (stream, device_end) = UnixStream::pair().unwrap();
        self.host.devices.connect(port, device_end.into(), Opening::Plain).unwrap();
        let (request, _) = self.receive().unwrap();
        assert_eq!((request.op, request.dst_port), (op::REQUEST, port));
        self.answer(&request, op::RESPONSE, 0, b"");
        (stream, request)
    }
}
