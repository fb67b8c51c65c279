//! One guest's NIC, as seen from here.

use std::{
    collections::{HashMap, VecDeque},
    io,
    net::{IpAddr, Ipv6Addr},
    os::fd::{AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use forkling_proto::network::{GATEWAY, GATEWAY_V6, ipv6_of, mac_of};
use mio::{Interest, Registry, Token, unix::SourceFd};
use rustix::{
    io::Errno,
    net::{RecvFlags, SendFlags, sockopt},
};

use crate::{
    bucket::Bucket,
    control::{Counters, Guest, Limits, Policy, Report},
    denials::Denials,
    flow::FlowId,
    table::Key,
    wire::VIRTIO,
};

/// Bytes that wait for a guest that does not take them; more are dropped, and no frame of the guest is read meanwhile.
const WAITING: usize = 512 * 1024;

/// Bytes beyond that for answers to what was read before.
const EXCESS: usize = 128 * 1024;

/// Room in the kernel for frames to a guest, in bytes.
const SEND_BUFFER: usize = 1024 * 1024;

/// Addresses that a guest knows by name at a time.
const OPENED: usize = 4096;

/// What a link has once its guest has an identity.
#[derive(Debug)]
pub struct Bound {
    /// Who.
    pub guest: Guest,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Its IPv6 address.
    pub ipv6: Ipv6Addr,
    /// What it may reach.
    pub policy: Policy,
    /// How much.
    pub limits: Limits,
    /// What it did.
    pub counters: Counters,
    /// What it was denied.
    pub denials: Denials,
    /// Its flows.
    pub flows: HashMap<FlowId, Key>,
    /// Flows that wait for room towards the guest.
    pub blocked: Vec<Key>,
    /// Names under which it has resolved an address, and until when they hold.
    opened: HashMap<IpAddr, Vec<(String, Instant)>>,
    /// Names being asked for.
    pub asking: usize,
    bytes_in: Bucket,
    bytes_out: Bucket,
    frames: Bucket,
    /// Names it may still ask for.
    pub names: Bucket,
    /// ICMP errors it may still be sent.
    pub errors: Bucket,
}

impl Bound {
    /// Without flows.
    pub fn new(guest: Guest, policy: Policy, limits: Limits, now: Instant) -> Self {
        Self {
            mac: mac_of(guest.ipv4),
            ipv6: ipv6_of(guest.ipv4),
            guest,
            policy,
            counters: Counters::default(),
            denials: Denials::new(now),
            flows: HashMap::new(),
            blocked: Vec::new(),
            opened: HashMap::new(),
            asking: 0,
            bytes_in: Bucket::new(limits.bytes_per_s, now),
            bytes_out: Bucket::new(limits.bytes_per_s, now),
            frames: Bucket::new(limits.frames_per_s.into(), now),
            names: Bucket::new(limits.names_per_s.into(), now),
            errors: Bucket::new(100, now),
            limits,
        }
    }

    /// The guest's address of the family of `other`.
    pub fn address(&self, other: IpAddr) -> IpAddr {
        if other.is_ipv4() { self.guest.ipv4.into() } else { self.ipv6.into() }
    }

    /// Notes a denial.
    pub fn deny(&mut self, what: &str, name: Option<String>, address: Option<IpAddr>, port: Option<u16>) {
        self.counters.denied += 1;
        self.denials.add(&self.guest.id, what.to_owned(), name, address, port);
    }

    /// Names under which the address was resolved and that still hold.
    pub fn names_of(&self, address: IpAddr, now: Instant) -> impl Iterator<Item = &str> + Clone {
        let names = self.opened.get(&address).into_iter().flatten();
        names.filter(move |(_, until)| *until > now).map(|(name, _)| name.as_str())
    }

    /// Notes that `name` has an address until then.
    pub fn open(&mut self, address: IpAddr, name: &str, until: Instant, now: Instant) {
        if self.opened.len() >= OPENED && !self.opened.contains_key(&address) {
            self.opened.retain(|_, names| {
                names.retain(|(_, until)| *until > now);
                !names.is_empty()
            });
            if self.opened.len() >= OPENED {
                return;
            }
        }
        let names = self.opened.entry(address).or_default();
        if let Some((_, known)) = names.iter_mut().find(|(known, _)| known == name) {
            *known = until.max(*known);
        } else if names.len() < 16 {
            names.push((name.to_owned(), until));
        }
    }

    /// No address is known by a name any more.
    pub fn forget_names(&mut self) {
        self.opened.clear();
    }

    /// The gateway's address of the family of `other`.
    pub fn gateway(other: IpAddr) -> IpAddr {
        if other.is_ipv4() { GATEWAY.into() } else { GATEWAY_V6.into() }
    }
}

/// A link.
#[derive(Debug)]
pub struct Link {
    /// As `forkd` numbers it.
    pub id: u64,
    frames: OwnedFd,
    /// There may be a frame (until a read finds none).
    pub readable: bool,
    /// It stands in the queue of work.
    pub queued: bool,
    waiting: VecDeque<Box<[u8]>>,
    waiting_bytes: usize,
    /// What it has once it is bound.
    pub bound: Option<Box<Bound>>,
}

/// What reading a frame came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// A packet of this many bytes.
    Packet(usize),
    /// None is there, or none is taken now.
    Nothing,
    /// None is taken for so long, because of a limit.
    Later(Duration),
    /// The guest's side is gone.
    Closed,
}

impl Link {
    /// Over its frame socket.
    ///
    /// # Errors
    /// It is no socket.
    pub fn new(id: u64, frames: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&frames, true)?;
        sockopt::set_socket_send_buffer_size(&frames, SEND_BUFFER)?;
        let waiting = VecDeque::new();
        Ok(Self { id, frames, readable: true, queued: false, waiting, waiting_bytes: 0, bound: None })
    }

    /// Has epoll watch the frame socket.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub fn watch(&self, registry: &Registry, token: Token) -> io::Result<()> {
        registry.register(
            &mut SourceFd(&self.frames.as_raw_fd()),
            token,
            Interest::READABLE | Interest::WRITABLE,
        )
    }

    /// Reads a packet, within the limits of the link.
    pub fn receive(&mut self, buffer: &mut [u8], now: Instant) -> Received {
        let Some(bound) = &mut self.bound else { return Received::Nothing };
        if !self.readable || self.waiting_bytes >= WAITING {
            return Received::Nothing;
        }
        for bucket in [&mut bound.bytes_in, &mut bound.frames] {
            if !bucket.open(now) {
                return Received::Later(bucket.wait());
            }
        }
        match rustix::net::recv(&self.frames, &mut *buffer, RecvFlags::TRUNC) {
            Ok((_, 0)) => Received::Closed,
            Ok((_, length)) => {
                let bytes = length.saturating_sub(VIRTIO) as u64;
                bound.bytes_in.take(bytes);
                bound.frames.take(1);
                bound.counters.frames_from_guest += 1;
                bound.counters.bytes_from_guest += bytes;
                Received::Packet(length)
            }
            Err(Errno::AGAIN) => {
                self.readable = false;
                Received::Nothing
            }
            Err(Errno::INTR) => Received::Nothing,
            Err(_) => Received::Closed,
        }
    }

    /// Whether a packet would be sent at once, and within limits. If not: after how long to ask again; without an
    /// answer, when the socket has room.
    pub fn has_room(&mut self, now: Instant) -> Result<(), Option<Duration>> {
        let Some(bound) = &mut self.bound else { return Err(None) };
        if !self.waiting.is_empty() {
            return Err(None);
        }
        if bound.bytes_out.open(now) { Ok(()) } else { Err(Some(bound.bytes_out.wait())) }
    }

    /// Sends a packet, or has it wait, or drops it.
    pub fn send(&mut self, packet: &[u8]) {
        let Some(bound) = &mut self.bound else { return };
        if self.waiting.is_empty() {
            match rustix::net::send(&self.frames, packet, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(_) => return bound.sent(packet.len()),
                Err(Errno::AGAIN | Errno::NOBUFS) => {}
                Err(_) => return bound.counters.frames_dropped += 1,
            }
        }
        if self.waiting_bytes + packet.len() > WAITING + EXCESS {
            return bound.counters.frames_dropped += 1;
        }
        self.waiting_bytes += packet.len();
        self.waiting.push_back(packet.into());
    }

    /// Like [`Link::send`], but dropped while the link is over its rate.
    pub fn send_if_allowed(&mut self, packet: &[u8], now: Instant) {
        let Some(bound) = &mut self.bound else { return };
        if bound.bytes_out.open(now) {
            self.send(packet);
        } else {
            bound.counters.frames_dropped += 1;
        }
    }

    /// Sends what waits, as far as there is room. Returns whether nothing waits any more.
    pub fn flush(&mut self) -> bool {
        let Some(bound) = &mut self.bound else { return true };
        while let Some(packet) = self.waiting.front() {
            match rustix::net::send(&self.frames, packet, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(_) => bound.sent(packet.len()),
                Err(Errno::AGAIN | Errno::NOBUFS) => return false,
                Err(_) => bound.counters.frames_dropped += 1,
            }
            self.waiting_bytes -= packet.len();
            self.waiting.pop_front();
        }
        true
    }

    /// Bytes that wait, and the most there can be.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn waiting(&self) -> (usize, usize) {
        (self.waiting_bytes, WAITING + EXCESS)
    }

    /// Drops what waits, in both directions.
    pub fn discard(&mut self) {
        // A shorter read takes a whole packet too.
        while let Ok((1.., _)) | Err(Errno::INTR) =
            rustix::net::recv(&self.frames, &mut [0; VIRTIO], RecvFlags::empty())
        {}
        self.waiting.clear();
        self.waiting_bytes = 0;
    }

    /// State for `forkd`; `None` if it is not bound.
    pub fn report(&self, denials_from: u64) -> Option<Report> {
        let bound = self.bound.as_ref()?;
        let counters = Counters { flows: bound.flows.len() as u64, ..bound.counters };
        let denials = bound.denials.from(denials_from);
        Some(Report { counters, next_denial: bound.denials.next(), denials })
    }
}

impl Bound {
    fn sent(&mut self, length: usize) {
        let bytes = length.saturating_sub(VIRTIO) as u64;
        self.bytes_out.take(bytes);
        self.counters.frames_to_guest += 1;
        self.counters.bytes_to_guest += bytes;
    }
}
