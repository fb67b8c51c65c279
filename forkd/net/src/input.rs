//! Packets of guests. Everything in them is hostile.

use std::net::{IpAddr, Ipv4Addr};

use forkling_proto::network::{GATEWAY_MAC, TEMPLATE, TEMPLATE_V6, ipv6_of};

use crate::{
    control::{MAX_PACKET, Protocol},
    dhcp,
    dns::ReplyTo,
    icmp,
    link::Bound,
    server::Net,
    table::Key,
    wire::{self, Bad, ICMP, ICMPV6, Ip, PAYLOAD, TCP, UDP, Unreachable, VIRTIO, be16},
};

impl Net {
    /// Takes a packet of `length` bytes, of which as many are in the buffer as it holds.
    pub fn on_packet(&mut self, key: Key, buffer: &mut [u8], length: usize) {
        let Some(bound) = self.bound_mut(key) else { return };
        if !(PAYLOAD..=MAX_PACKET).contains(&length) {
            bound.counters.frames_refused += 1;
            return;
        }
        let packet = &mut buffer[..length];
        if packet[VIRTIO + 6..VIRTIO + 12] != bound.mac || !wire::header_is_sane(packet) {
            let spoofed = packet[VIRTIO + 6..VIRTIO + 12] != bound.mac;
            bound.counters.frames_refused += 1;
            if spoofed {
                bound.deny("source", None, None, None);
            }
            return;
        }
        let payload = &packet[PAYLOAD..];
        let ip = match be16(packet, VIRTIO + 12) {
            wire::ARP => return self.on_arp(key, packet),
            wire::IPV4 => wire::ipv4(payload),
            wire::IPV6 => wire::ipv6(payload),
            _ => Err(Bad::Unheard),
        };
        match ip {
            Ok(ip) => self.on_ip(key, &ip, packet),
            Err(bad) => {
                bound.counters.frames_refused += u64::from(bad != Bad::Unheard);
                if bad == Bad::Fragment {
                    bound.deny("fragment", None, None, None);
                }
            }
        }
    }

    /// Whoever is sought, frames for it go to the gateway (RFC 826).
    fn on_arp(&mut self, key: Key, packet: &[u8]) {
        let now = self.now;
        let Some(link) = self.links.get_mut(key) else { return };
        let Some(bound) = &mut link.bound else { return };
        let arp = &packet[PAYLOAD..];
        if arp.len() < 28 || arp[..8] != [0, 1, 8, 0, 6, 4, 0, 1] || arp[8..14] != bound.mac {
            bound.counters.frames_refused += 1;
            return;
        }
        let own = bound.guest.ipv4.octets();
        // A guest that looks for another with its own address must not find one. Sources are those of the loopback
        // device, too: nothing is learned from them.
        if arp[24..28] == own || arp[14..18] == [0; 4] {
            return;
        }
        let mut answer = vec![0; PAYLOAD];
        wire::link_header(&mut answer, bound.mac, GATEWAY_MAC, wire::ARP);
        answer.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, 2]);
        answer.extend_from_slice(&GATEWAY_MAC);
        answer.extend_from_slice(&arp[24..28]);
        answer.extend_from_slice(&arp[8..18]);
        link.send_if_allowed(&answer, now);
    }

    fn on_ip(&mut self, key: Key, ip: &Ip, packet: &mut [u8]) {
        let Some(bound) = self.bound_mut(key) else { return };
        if ip.source != bound.address(ip.source) {
            return self.on_foreign_source(key, ip, &packet[PAYLOAD..]);
        }
        let (own, bytes) = (bound.address(ip.destination), &packet[PAYLOAD..]);
        if ip.destination == Bound::gateway(ip.destination) {
            return self.on_gateway(key, ip, bytes);
        }
        if ip.destination == own {
            bound.counters.frames_refused += 1;
            return;
        }
        let payload = &bytes[ip.start..ip.end];
        let everyone = match ip.destination {
            IpAddr::V4(v4) => v4.is_multicast() || v4.is_broadcast(),
            IpAddr::V6(v6) => v6.is_multicast(),
        };
        if everyone {
            match ip.protocol {
                UDP if be16(payload, 2) == 67 => self.on_dhcp(key, payload),
                ICMPV6 => self.on_neighbour(key, ip, bytes),
                // Nobody is there to hear it.
                _ => {}
            }
            return;
        }
        match self.guest_at(ip.destination) {
            Some(guest) => self.pass_to_guest(key, guest, ip, packet),
            None => self.pass_outside(key, ip, bytes),
        }
    }

    /// A packet whose source is not the guest's.
    fn on_foreign_source(&mut self, key: Key, ip: &Ip, bytes: &[u8]) {
        let (now, guests) = (self.now, self.settings.guests);
        let payload = &bytes[ip.start..ip.end];
        let former = match ip.source {
            IpAddr::V4(v4) if v4.is_unspecified() && ip.protocol == UDP && be16(payload, 2) == 67 => {
                return self.on_dhcp(key, payload);
            }
            IpAddr::V6(v6) if v6.is_unspecified() || v6.is_unicast_link_local() => {
                return self.on_neighbour(key, ip, bytes);
            }
            IpAddr::V4(v4) => v4 == TEMPLATE || guests.contains(&v4),
            IpAddr::V6(v6) => v6.segments()[..6] == TEMPLATE_V6.segments()[..6],
        };
        let template = ip.source == TEMPLATE || ip.source == TEMPLATE_V6;
        let Some(link) = self.links.get_mut(key) else { return };
        let Some(bound) = &mut link.bound else { return };
        if !(template && ip.protocol == TCP) {
            bound.counters.frames_refused += 1;
            bound.deny("source", None, Some(ip.source), None);
        }
        // A connection from before the fork, or of the fork from which this one was made. Only the guest itself hears it.
        if former
            && ip.protocol == TCP
            && let Some(answer) = wire::reset(bound.mac, ip, bytes)
        {
            link.send_if_allowed(&answer, now);
        }
    }

    fn on_dhcp(&mut self, key: Key, payload: &[u8]) {
        let now = self.now;
        let Some(link) = self.links.get_mut(key) else { return };
        let Some(bound) = &link.bound else { return };
        if let Some(answer) = dhcp::answer(bound.mac, bound.guest.ipv4, &payload[8..]) {
            link.send_if_allowed(&answer, now);
        }
    }

    fn on_neighbour(&mut self, key: Key, ip: &Ip, bytes: &[u8]) {
        let now = self.now;
        let Some(link) = self.links.get_mut(key) else { return };
        let Some(bound) = &mut link.bound else { return };
        if ip.protocol != ICMPV6 {
            return;
        }
        if !wire::checksum_is_right(ip, bytes) {
            bound.counters.frames_refused += 1;
            return;
        }
        if let Some(answer) = icmp::neighbour(bound.mac, bound.ipv6, ip, bytes) {
            link.send_if_allowed(&answer, now);
        }
    }

    /// To the gateway itself: names, echo, neighbours, DHCP.
    fn on_gateway(&mut self, key: Key, ip: &Ip, bytes: &[u8]) {
        let payload = &bytes[ip.start..ip.end];
        match ip.protocol {
            UDP if be16(payload, 2) == 53 => {
                let data = &payload[8..usize::from(be16(payload, 4))];
                self.ask(key, data, ReplyTo::Udp(ip.destination, be16(payload, 0)));
            }
            UDP if be16(payload, 2) == 67 => self.on_dhcp(key, payload),
            UDP => self.unreachable(key, ip, bytes, Unreachable::Port),
            TCP => self.on_tcp(key, ip, bytes),
            ICMPV6 if payload[0] == 135 => self.on_neighbour(key, ip, bytes),
            ICMP | ICMPV6 => self.echo(key, ip, bytes),
            _ => self.deny(key, ip, bytes),
        }
    }

    /// Answers an echo request in the name of whoever was asked.
    pub fn echo(&mut self, key: Key, ip: &Ip, bytes: &[u8]) {
        let now = self.now;
        let Some(link) = self.links.get_mut(key) else { return };
        let Some(bound) = &mut link.bound else { return };
        if !wire::checksum_is_right(ip, bytes) {
            bound.counters.frames_refused += 1;
        } else if let Some(answer) = icmp::echo(bound.mac, ip, bytes) {
            link.send_if_allowed(&answer, now);
        }
    }

    /// The IPv4 address of the guest behind an address, whether there is one or not.
    fn guest_at(&self, address: IpAddr) -> Option<Ipv4Addr> {
        let v4 = match address {
            IpAddr::V4(v4) => v4,
            IpAddr::V6(v6) => Ipv4Addr::from_bits(v6.to_bits() as u32),
        };
        let same = match address {
            IpAddr::V4(_) => true,
            IpAddr::V6(v6) => v6 == ipv6_of(v4),
        };
        (same && self.settings.guests.contains(&v4)).then_some(v4)
    }

    /// To a guest: of the same group, or to nobody.
    fn pass_to_guest(&mut self, key: Key, to: Ipv4Addr, ip: &Ip, packet: &mut [u8]) {
        let now = self.now;
        let group = |link: Key| {
            let guest = &self.links.get(link)?.bound.as_ref()?.guest;
            Some(&guest.group.as_ref()?.group)
        };
        let peer = self.by_address.get(&to).copied();
        let together = peer.is_some_and(|peer| group(peer).is_some() && group(peer) == group(key));
        let Some(peer) = peer.filter(|_| together).and_then(|peer| self.links.get_mut(peer)) else {
            return self.deny(key, ip, &packet[PAYLOAD..]);
        };
        let Some(bound) = &peer.bound else { return };
        packet[VIRTIO..VIRTIO + 6].copy_from_slice(&bound.mac);
        packet[VIRTIO + 6..VIRTIO + 12].copy_from_slice(&GATEWAY_MAC);
        packet[10..12].fill(0);
        peer.send_if_allowed(packet, now);
    }

    fn pass_outside(&mut self, key: Key, ip: &Ip, bytes: &[u8]) {
        match ip.protocol {
            TCP => self.on_tcp(key, ip, bytes),
            UDP => self.on_datagram(key, ip, bytes, Protocol::Udp),
            ICMP | ICMPV6 => self.on_datagram(key, ip, bytes, Protocol::Icmp),
            _ => self.deny(key, ip, bytes),
        }
    }

    /// Denies a packet of any protocol, and tells the guest.
    pub fn deny(&mut self, key: Key, ip: &Ip, bytes: &[u8]) {
        let payload = &bytes[ip.start..ip.end];
        let (what, port) = match ip.protocol {
            TCP => ("tcp".to_owned(), Some(be16(payload, 2))),
            UDP => ("udp".to_owned(), Some(be16(payload, 2))),
            ICMP | ICMPV6 => ("icmp".to_owned(), None),
            other => (other.to_string(), None),
        };
        let now = self.now;
        let Some(bound) = self.bound_mut(key) else { return };
        let name = bound.names_of(ip.destination, now).next().map(str::to_owned);
        bound.deny(&what, name, Some(ip.destination), port);
        if ip.protocol == TCP {
            self.refuse(key, ip, bytes);
        } else {
            self.unreachable(key, ip, bytes, Unreachable::Prohibited);
        }
    }

    /// Resets the guest's side of a connection.
    pub fn refuse(&mut self, key: Key, ip: &Ip, bytes: &[u8]) {
        let now = self.now;
        let Some(link) = self.links.get_mut(key) else { return };
        let Some(bound) = &link.bound else { return };
        if let Some(answer) = wire::reset(bound.mac, ip, bytes) {
            link.send_if_allowed(&answer, now);
        }
    }

    /// An ICMP error, at a bounded rate, and never for one.
    pub fn unreachable(&mut self, key: Key, ip: &Ip, bytes: &[u8], why: Unreachable) {
        let now = self.now;
        let Some(link) = self.links.get_mut(key) else { return };
        let Some(bound) = &mut link.bound else { return };
        let request = icmp::echo_types(ip.source.is_ipv6()).0;
        let is_error = matches!(ip.protocol, ICMP | ICMPV6) && bytes[ip.start] != request;
        if is_error || !bound.errors.one(now) {
            return;
        }
        let gateway = Bound::gateway(ip.source);
        if let Some(answer) = wire::unreachable(bound.mac, gateway, ip, bytes, why) {
            link.send_if_allowed(&answer, now);
        }
    }
}
