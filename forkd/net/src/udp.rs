//! Datagrams, and ICMP echo by the host's ping sockets: one host socket for each of the guest's.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket as StdUdp},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use mio::{Interest, Registry, Token, unix::SourceFd};
use socket2::{Domain, Protocol as SocketProtocol, Socket, Type};

use crate::{
    control::Protocol,
    flow::{FlowId, Next},
    icmp,
    tcp::{Turn, host_address},
    wire::{self, Unreachable},
};

/// Without a datagram, a flow is over; those of names sooner.
const IDLE: Duration = Duration::from_secs(60);
const IDLE_NAMES: Duration = Duration::from_secs(10);

/// Datagrams taken from the host in a turn.
const TURN: usize = 32;

/// The flow.
#[derive(Debug)]
pub struct Udp {
    socket: StdUdp,
    readable: bool,
    used: Instant,
}

impl Udp {
    /// Connects a socket and has the poll watch it.
    ///
    /// # Errors
    /// The host has no descriptor, no route, or for ICMP no permission.
    pub fn connect(id: &FlowId, registry: &Registry, token: Token, now: Instant) -> io::Result<Self> {
        let target = host_address(id.remote, id.remote_port);
        let socket: StdUdp = match id.protocol {
            Protocol::Icmp => ping_socket(target.ip())?.into(),
            _ => StdUdp::bind(any(target))?,
        };
        socket.connect(target)?;
        socket.set_nonblocking(true)?;
        registry.register(&mut SourceFd(&socket.as_raw_fd()), token, Interest::READABLE)?;
        Ok(Self { socket, readable: true, used: now })
    }

    /// The host's socket became readable.
    pub fn ready(&mut self) {
        self.readable = true;
    }

    /// Sends a datagram (for ICMP, an echo request). What the host cannot take at once is lost, as on any network.
    ///
    /// # Errors
    /// What became of an earlier one: nobody listens, no way leads there.
    pub fn send(&mut self, data: &[u8], now: Instant) -> io::Result<()> {
        self.used = now;
        match self.socket.send(data) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }

    /// Passes on what has come from the host.
    pub fn turn(&mut self, id: &FlowId, turn: &mut Turn<'_>) -> Next {
        let Some(bound) = &turn.link.bound else { return Next::End };
        let (mac, guest) = (bound.mac, bound.address(id.remote));
        for _ in 0..TURN {
            if !self.readable {
                break;
            }
            match self.socket.recv(turn.scratch) {
                Ok(length) => {
                    self.used = turn.now;
                    let data = &mut turn.scratch[..length];
                    let packet = match id.protocol {
                        Protocol::Icmp => icmp::reply(mac, id, guest, data),
                        _ => wire::udp(mac, (id.remote, id.remote_port), (guest, id.port), data),
                    };
                    packet.inspect(|packet| turn.link.send_if_allowed(packet, turn.now));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    refused(id, turn);
                }
                Err(_) => {}
            }
        }
        if self.readable {
            return Next::Again;
        }
        let idle = if id.remote_port == 53 { IDLE_NAMES } else { IDLE };
        match idle.checked_sub(turn.now.saturating_duration_since(self.used)) {
            Some(rest) if !rest.is_zero() => Next::WaitFor(rest),
            _ => Next::End,
        }
    }
}

/// Tells the guest that nobody listens.
fn refused(id: &FlowId, turn: &mut Turn<'_>) {
    let Some(bound) = &mut turn.link.bound else { return };
    if id.protocol != Protocol::Udp || !bound.errors.one(turn.now) {
        return;
    }
    let guest = bound.address(id.remote);
    // The datagram is gone; its headers are made again for the error that quotes them.
    let Some(quoted) = wire::udp(bound.mac, (guest, id.port), (id.remote, id.remote_port), &[]) else {
        return;
    };
    let bytes = &quoted[wire::PAYLOAD..];
    let ip = if id.remote.is_ipv4() { wire::ipv4(bytes) } else { wire::ipv6(bytes) };
    let Ok(ip) = ip else { return };
    let gateway = crate::link::Bound::gateway(id.remote);
    if let Some(packet) = wire::unreachable(bound.mac, gateway, &ip, bytes, Unreachable::Port) {
        turn.link.send_if_allowed(&packet, turn.now);
    }
}

/// A socket for ICMP echo that needs no privilege (`net.ipv4.ping_group_range`).
///
/// # Errors
/// The host does not permit it.
pub fn ping_socket(target: IpAddr) -> io::Result<Socket> {
    let (domain, protocol) = match target {
        IpAddr::V4(_) => (Domain::IPV4, SocketProtocol::ICMPV4),
        IpAddr::V6(_) => (Domain::IPV6, SocketProtocol::ICMPV6),
    };
    Socket::new(domain, Type::DGRAM, Some(protocol))
}

/// Any port of the family of `target`.
pub fn any(target: SocketAddr) -> SocketAddr {
    match target {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}
