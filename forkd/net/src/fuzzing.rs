//! Entry points of the fuzz targets (`fuzz/`): bytes become what hostile guests, and resolvers, send.
//!
//! Nothing leaves the process: no rule allows anything outside, and there is no resolver.

use std::{
    cell::RefCell,
    net::Ipv4Addr,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use forkling_proto::network::{GATEWAY_MAC, mac_of};
use forkling_vmm::arena::Message;
use mio::Poll;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use crate::{
    control::{Destination, Guest, Limits, MAX_PACKET, Membership, Policy, Rule, Settings},
    server::{Net, Work},
    table::Key,
    wire::{self, IPV4, IPV6, PAYLOAD, VIRTIO},
};

mod frames;
#[cfg(test)]
mod tests;

pub use crate::dns::fuzzing::dns;
pub use frames::frames;

/// Names that guests may resolve.
pub(crate) const ALLOWED: &str = "*.example.org";

/// Flows of a guest at a time.
pub(crate) const FLOWS: u32 = 16;

/// Rounds after which everything has settled while the clock stands.
const ROUNDS: usize = 2000;

/// A guest's side of a link.
pub(crate) struct End {
    pub id: u64,
    pub key: Key,
    pub ipv4: Ipv4Addr,
    pub wire: OwnedFd,
}

/// The one state of the process; each run begins and ends without links.
pub(crate) fn with_net<T>(run: impl FnOnce(&mut Net) -> T) -> T {
    thread_local! {
        static NET: RefCell<Net> = RefCell::new(new());
    }
    NET.with_borrow_mut(|net| {
        net.now = net.now.max(Instant::now());
        let result = run(net);
        // Long enough for every timer.
        net.now += Duration::from_hours(1);
        settle(net);
        assert_eq!((net.links.len(), net.flows.len(), net.timers()), (0, 0, 0), "something is left");
        assert!(net.ids.is_empty() && net.by_address.is_empty() && net.groups.is_empty());
        result
    })
}

fn new() -> Net {
    let guests = "100.100.0.0/16".parse().expect("it is a network");
    let poll = Poll::new().expect("the host has a descriptor");
    Net::new(poll, Settings { guests, resolvers: Vec::new() }).expect("the host's addresses can be read")
}

/// A bound link.
pub(crate) fn attach(net: &mut Net, id: u64, group: Option<&str>, limits: Limits) -> End {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (wire, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("the host has sockets");
    let ipv4 = Ipv4Addr::new(100, 100, 0, id as u8);
    net.attach(id, vec![theirs]);
    let names = vec![format!("worker-{id}")];
    let group = group.map(|group| Membership { group: group.to_owned(), names });
    let rules = vec![Rule { to: Destination::Name(ALLOWED.to_owned()), protocol: None, ports: vec![(1, 0)] }];
    net.bind(id, Guest { id: format!("fork-{id}"), ipv4, group }, Policy { rules }, limits);
    End { id, key: net.ids[&id], ipv4, wire }
}

pub(crate) fn detach(net: &mut Net, end: End) {
    net.detach(end.key);
    drop(end);
}

/// Has everything its turn until nothing is left to do at this moment.
pub(crate) fn settle(net: &mut Net) {
    let rounds = (0..ROUNDS).take_while(|_| net.turns()).count();
    assert!(rounds < ROUNDS, "there is always more to do");
}

impl End {
    /// Sends a packet as it is. False: there is no room.
    pub fn send(&self, net: &mut Net, packet: &[u8]) -> bool {
        let sent = send(&self.wire, packet, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).is_ok();
        if let Some(link) = net.links.get_mut(self.key) {
            link.readable = true;
        }
        net.enqueue(Work::Link(self.key));
        sent
    }

    /// The next packet, checked for what every one must be.
    pub fn receive(&self, net: &mut Net) -> Option<Vec<u8>> {
        let mut packet = vec![0; MAX_PACKET + 1];
        let length = loop {
            let (_, length) = recv(&self.wire, &mut packet[..], RecvFlags::DONTWAIT).ok()?;
            // For the device, which never lets its guest send what such a message answers.
            let Some(&message) = packet.first_chunk().filter(|_| length == Message::LEN) else {
                break length;
            };
            let message = Message::decode(message);
            assert!(matches!(message, Message::Gone | Message::Refused), "{message:?} without an arena");
        };
        packet.truncate(length);
        assert!((PAYLOAD..=MAX_PACKET).contains(&length), "a packet of {length} bytes");
        assert_eq!(packet[VIRTIO..VIRTIO + 6], mac_of(self.ipv4), "for another guest");
        assert_eq!(packet[VIRTIO + 6..VIRTIO + 12], GATEWAY_MAC, "not of the gateway");
        assert!(wire::header_is_sane(&packet), "an offload header that no kernel would take");
        let payload = &packet[PAYLOAD..];
        match wire::be16(&packet, VIRTIO + 12) {
            IPV4 => assert!(wire::ipv4(payload).is_ok(), "IPv4 that is wrong"),
            IPV6 => assert!(wire::ipv6(payload).is_ok(), "IPv6 that is wrong"),
            kind => assert_eq!(kind, wire::ARP, "a protocol that nobody speaks"),
        }
        net.enqueue(Work::Link(self.key));
        Some(packet)
    }

    /// That what the guest has here is bounded.
    pub fn check(&self, net: &Net) {
        let Some(link) = net.links.get(self.key) else { return };
        let (waiting, most) = link.waiting();
        assert!(waiting <= most, "{waiting} bytes wait for a guest");
        let flows = link.bound.as_ref().map_or(0, |bound| bound.flows.len());
        assert!(flows <= FLOWS as usize, "{flows} flows of a guest");
    }
}
