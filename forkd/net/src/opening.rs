//! New flows: from a guest's first packet to a socket of the host.

use std::{io, net::SocketAddr};

use forkling_proto::network::HOST;
use mio::{Interest, net::TcpStream};

use crate::{
    control::Protocol,
    flow::{Flow, FlowId, Kind},
    icmp,
    link::Bound,
    policy::Verdict,
    server::Net,
    table::{self, Key},
    tcp::{Connected, Tcp, Turn, host_address},
    udp::Udp,
    wire::{self, Ip, Unreachable, be16},
};

/// Longest SYN that is kept until the host has connected.
const SYN: usize = 512;

impl Net {
    /// Takes a TCP segment for the gateway or the outside.
    pub fn on_tcp(&mut self, key: Key, ip: &Ip, bytes: &[u8]) {
        let segment = &bytes[ip.start..ip.end];
        let id = FlowId {
            protocol: Protocol::Tcp,
            port: be16(segment, 0),
            remote: ip.destination,
            remote_port: be16(segment, 2),
        };
        let Some(bound) = self.bound_mut(key) else { return };
        if let Some(&flow) = bound.flows.get(&id) {
            return self.flow_turn(flow, Some(&bytes[..ip.end]));
        }
        // SYN without ACK, FIN or RST.
        if segment[13] & 0x17 != 2 || ip.end > SYN || id.port == 0 || id.remote_port == 0 {
            return self.refuse(key, ip, bytes);
        }
        if ip.destination != Bound::gateway(ip.destination) {
            return self.new_tcp(key, id, ip, bytes);
        }
        if id.remote_port == 53 { self.new_names(key, id, ip, bytes) } else { self.deny(key, ip, bytes) }
    }

    /// A place for one more flow.
    fn has_place(&mut self, key: Key) -> bool {
        let Some(bound) = self.bound_mut(key) else { return false };
        let full = bound.limits.flows != 0 && bound.flows.len() >= bound.limits.flows as usize;
        bound.counters.limited += u64::from(full);
        !full
    }

    /// Whether a flow is allowed and has a place. If so, the name that allows it.
    fn admit(&mut self, key: Key, id: &FlowId, ip: &Ip, bytes: &[u8]) -> Option<Option<String>> {
        let name = match self.decide(key, id.target(), None) {
            Verdict::Denied => {
                self.deny(key, ip, bytes);
                return None;
            }
            Verdict::Allowed => None,
            Verdict::AllowedAs(name) => Some(name),
        };
        if self.has_place(key) {
            return Some(name);
        }
        match id.protocol {
            Protocol::Tcp => self.refuse(key, ip, bytes),
            _ => self.unreachable(key, ip, bytes, Unreachable::Host),
        }
        None
    }

    fn new_tcp(&mut self, key: Key, id: FlowId, ip: &Ip, bytes: &[u8]) {
        let Some(name) = self.admit(key, &id, ip, bytes) else { return };
        let token = self.flows.next_key().token(table::Kind::Flow);
        let connected = TcpStream::connect(host_address(id.remote, id.remote_port)).and_then(|mut stream| {
            self.poll.registry().register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
            // Small answers must not wait for acknowledgements.
            stream.set_nodelay(true)?;
            Ok(stream)
        });
        match connected {
            Ok(stream) => {
                let tcp = Tcp::connecting(stream, bytes[..ip.end].to_vec());
                self.insert(key, id, name, Kind::Tcp(Box::new(tcp)));
            }
            Err(error) => self.failed(key, ip, bytes, &error),
        }
    }

    fn new_names(&mut self, key: Key, id: FlowId, ip: &Ip, bytes: &[u8]) {
        if !self.has_place(key) {
            return self.refuse(key, ip, bytes);
        }
        let uptime = self.uptime();
        let Some(link) = self.links.get_mut(key) else { return };
        let busy = link.bound.as_ref().map_or(0, |bound| bound.flows.len());
        let turn = Turn { link, scratch: &mut self.scratch, now: self.now, uptime };
        let Some(tcp) = Tcp::names(SocketAddr::new(id.remote, id.remote_port), busy, &turn) else { return };
        let flow = self.insert(key, id, None, Kind::Tcp(Box::new(tcp)));
        self.flow_turn(flow, Some(&bytes[..ip.end]));
    }

    fn insert(&mut self, link: Key, id: FlowId, name: Option<String>, kind: Kind) -> Key {
        let flow = self.flows.insert(Flow { link, id, name, kind, queued: false, wake: None });
        if let Some(bound) = self.bound_mut(link) {
            bound.flows.insert(id, flow);
            bound.counters.flows_opened += 1;
        }
        flow
    }

    /// The turn of a connection that the host has still to make.
    pub fn connect_turn(&mut self, key: Key, packet: Option<&[u8]>) {
        let uptime = self.uptime();
        let Some(flow) = self.flows.get_mut(key) else { return };
        let Kind::Tcp(tcp) = &mut flow.kind else { return };
        if let Some(packet) = packet {
            // The guest gives up, or asks again.
            if parse(packet).is_some_and(|ip| packet[ip.start + 13] & 4 != 0) {
                tcp.reset_host();
                self.end_flow(key);
            }
            return;
        }
        match tcp.connect() {
            Connected::NotYet => {}
            Connected::Yes => {
                let Some(link) = self.links.get_mut(flow.link) else { return };
                let busy = link.bound.as_ref().map_or(0, |bound| bound.flows.len());
                let turn = Turn { link, scratch: &mut self.scratch, now: self.now, uptime };
                let local = SocketAddr::new(flow.id.remote, flow.id.remote_port);
                match tcp.open(local, busy, &turn) {
                    Some(syn) => self.flow_turn(key, Some(&syn)),
                    None => self.end_flow(key),
                }
            }
            Connected::Failed(error, syn) => {
                let link = flow.link;
                self.end_flow(key);
                if let Some(ip) = parse(&syn) {
                    self.failed(link, &ip, &syn, &error);
                }
            }
        }
    }

    /// Tells the guest why the host has no connection for it.
    fn failed(&mut self, key: Key, ip: &Ip, bytes: &[u8], error: &io::Error) {
        match error.kind() {
            // The guest waits for itself.
            io::ErrorKind::TimedOut => {}
            io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::PermissionDenied
            | io::ErrorKind::AddrNotAvailable => self.unreachable(key, ip, bytes, Unreachable::Host),
            io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => self.refuse(key, ip, bytes),
            _ => {
                // Most likely the process has no descriptor left. A guest must not fill the log with that.
                tracing::debug!(%error, address = %ip.destination, "a connection cannot be made");
                if let Some(bound) = self.bound_mut(key) {
                    bound.counters.limited += 1;
                }
                self.refuse(key, ip, bytes);
            }
        }
    }

    /// A datagram, or an echo request, for the outside.
    pub fn on_datagram(&mut self, key: Key, ip: &Ip, bytes: &[u8], protocol: Protocol) {
        let payload = &bytes[ip.start..ip.end];
        let icmp = protocol == Protocol::Icmp;
        if icmp && (payload[0], payload[1]) != (icmp::echo_types(ip.source.is_ipv6()).0, 0) {
            return self.deny(key, ip, bytes);
        }
        let (port, remote_port, data) = if icmp {
            (be16(payload, 4), 0, payload)
        } else {
            (be16(payload, 0), be16(payload, 2), &payload[8..usize::from(be16(payload, 4))])
        };
        let id = FlowId { protocol, port, remote: ip.destination, remote_port };
        let now = self.now;
        let known = self.bound_mut(key).and_then(|bound| bound.flows.get(&id).copied());
        let flow = match known {
            Some(flow) => flow,
            None => match self.new_datagrams(key, id, ip, bytes) {
                Some(flow) => flow,
                None => return,
            },
        };
        let Some(Flow { kind: Kind::Udp(udp), .. }) = self.flows.get_mut(flow) else { return };
        if let Err(error) = udp.send(data, now)
            && error.kind() == io::ErrorKind::ConnectionRefused
        {
            self.unreachable(key, ip, bytes, Unreachable::Port);
        }
        if known.is_none() {
            self.flow_turn(flow, None);
        }
    }

    fn new_datagrams(&mut self, key: Key, id: FlowId, ip: &Ip, bytes: &[u8]) -> Option<Key> {
        let name = self.admit(key, &id, ip, bytes)?;
        if id.protocol == Protocol::Icmp && id.remote == HOST {
            self.echo(key, ip, bytes);
            return None;
        }
        let token = self.flows.next_key().token(table::Kind::Flow);
        match Udp::connect(&id, self.poll.registry(), token, self.now) {
            Ok(udp) => Some(self.insert(key, id, name, Kind::Udp(Box::new(udp)))),
            Err(error) => {
                tracing::debug!(%error, address = %ip.destination, "datagrams cannot be passed on");
                self.unreachable(key, ip, bytes, Unreachable::Host);
                None
            }
        }
    }
}

/// An IP packet that was verified before.
fn parse(bytes: &[u8]) -> Option<Ip> {
    match bytes.first()? >> 4 {
        4 => wire::ipv4(bytes).ok(),
        _ => wire::ipv6(bytes).ok(),
    }
}
