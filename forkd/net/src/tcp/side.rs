//! The guest's side of a connection: one interface of the stack with one socket, whose address is the one dialled.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use forkling_proto::network::{GATEWAY_MAC, MTU};
use smoltcp::{
    iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet},
    phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken},
    socket::tcp::{Socket, SocketBuffer},
    time::{Duration as SmolDuration, Instant as SmolInstant},
    wire::{HardwareAddress, IpAddress, IpCidr},
};

use super::Turn;
use crate::{
    flow::Next,
    link::Link,
    wire::{self, PAYLOAD},
};

/// Segments sent in a turn.
const SEGMENTS: usize = 16;

/// An answer of the server usually takes the acknowledgement with it.
const ACK_DELAY: SmolDuration = SmolDuration::from_millis(2);

/// How long a guest may leave what it was sent unacknowledged.
const PATIENCE: SmolDuration = SmolDuration::from_secs(300);

/// The guest's side.
pub struct Side {
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
}

impl std::fmt::Debug for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Side").finish_non_exhaustive()
    }
}

impl Side {
    /// Listens as `local`. `busy` is the number of flows of the link: the more, the smaller the rings.
    pub fn new(local: SocketAddr, busy: usize, turn: &Turn<'_>) -> Option<Self> {
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = rand_seed();
        let mut wire = Wire { received: None, link: None, scratch: &mut [], now: turn.now };
        let mut interface = Interface::new(config, &mut wire, turn.smol());
        let bits = if local.is_ipv4() { 32 } else { 128 };
        let address = IpAddress::from(local.ip());
        interface.update_ip_addrs(|addresses| {
            // There is room for one.
            let _ = addresses.push(IpCidr::new(address, bits));
        });
        let ring = ring_size(busy);
        let mut socket = Socket::new(SocketBuffer::new(vec![0; ring]), SocketBuffer::new(vec![0; ring]));
        socket.set_ack_delay(Some(ACK_DELAY));
        socket.set_nagle_enabled(false);
        socket.set_timeout(Some(PATIENCE));
        socket.listen((address, local.port())).ok()?;
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        Some(Self { interface, sockets, handle })
    }

    /// The connection.
    pub fn socket(&mut self) -> &mut Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    /// Takes a packet of the guest.
    pub fn receive(&mut self, packet: &[u8], turn: &mut Turn<'_>) {
        let now = turn.smol();
        let mut wire =
            Wire { received: Some(packet), link: Some(turn.link), scratch: turn.scratch, now: turn.now };
        while self.interface.poll_ingress_single(now, &mut wire, &mut self.sockets)
            != PollIngressSingleResult::None
        {}
    }

    /// Sends what is due. Returns whether that was all.
    pub fn send(&mut self, turn: &mut Turn<'_>) -> bool {
        let now = turn.smol();
        let mut wire = Wire { received: None, link: Some(turn.link), scratch: turn.scratch, now: turn.now };
        for _ in 0..SEGMENTS {
            if self.interface.poll_egress(now, &mut wire, &mut self.sockets) == PollResult::None {
                return wire.has_room() || !self.is_due(now);
            }
        }
        !self.is_due(now)
    }

    fn is_due(&mut self, now: SmolInstant) -> bool {
        self.interface.poll_at(now, &self.sockets).is_some_and(|at| at <= now)
    }

    /// When it has something to do next.
    pub fn next(&mut self, turn: &Turn<'_>) -> Next {
        match self.interface.poll_delay(turn.smol(), &self.sockets) {
            Some(delay) => Next::WaitFor(Duration::from_micros(delay.total_micros().max(1000))),
            None => Next::Wait,
        }
    }
}

/// Of one ring, in bytes: large for few, and a bounded sum for many.
fn ring_size(busy: usize) -> usize {
    match busy {
        0..=16 => 256 * 1024,
        17..=64 => 128 * 1024,
        _ => 64 * 1024,
    }
}

/// What sequence numbers are made of.
fn rand_seed() -> u64 {
    let mut seed = [0; 8];
    // It cannot fail for so few bytes on any kernel we run on; numbers that can be guessed harm the guest only.
    let _ = rustix::rand::getrandom(&mut seed[..], rustix::rand::GetRandomFlags::empty());
    u64::from_ne_bytes(seed)
}

/// One flow's wire: at most one packet comes in, and those that go out go to the link.
struct Wire<'a> {
    received: Option<&'a [u8]>,
    link: Option<&'a mut Link>,
    scratch: &'a mut [u8],
    now: Instant,
}

impl Wire<'_> {
    fn has_room(&mut self) -> bool {
        self.link.as_mut().is_some_and(|link| link.has_room(self.now).is_ok())
    }
}

struct Received<'a>(&'a [u8]);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

struct Sender<'a> {
    link: Option<&'a mut Link>,
    scratch: &'a mut [u8],
}

impl TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let packet = &mut self.scratch[..PAYLOAD + length];
        let result = f(&mut packet[PAYLOAD..]);
        if let Some(link) = self.link
            && let Some(bound) = &link.bound
        {
            let kind = if packet[PAYLOAD] >> 4 == 4 { wire::IPV4 } else { wire::IPV6 };
            wire::link_header(packet, bound.mac, GATEWAY_MAC, kind);
            link.send(packet);
        }
        result
    }
}

impl Device for Wire<'_> {
    type RxToken<'b>
        = Received<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = Sender<'b>
    where
        Self: 'b;

    fn receive(&mut self, _: SmolInstant) -> Option<(Received<'_>, Sender<'_>)> {
        let packet = self.received.take()?;
        Some((Received(packet), Sender { link: self.link.as_deref_mut(), scratch: self.scratch }))
    }

    fn transmit(&mut self, _: SmolInstant) -> Option<Sender<'_>> {
        if !self.has_room() {
            return None;
        }
        Some(Sender { link: self.link.as_deref_mut(), scratch: self.scratch })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = usize::from(MTU);
        // That of received headers was verified before; the others cannot be wrong on a wire that is none.
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::None;
        capabilities
    }
}
