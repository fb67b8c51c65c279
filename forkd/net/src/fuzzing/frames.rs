//! Frames of two guests of a group and of one that is in none.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::Duration,
};

use forkling_proto::network::{GATEWAY, GATEWAY_MAC, GATEWAY_V6, HOST, TEMPLATE, ipv6_of, mac_of};

use super::{ALLOWED, End, FLOWS, attach, detach, settle, with_net};
use crate::{
    control::{Destination, Limits, Policy, Rule},
    server::Net,
    wire::{self, IPV4, IPV6, PAYLOAD, TCP, VIRTIO},
};

const OPERATIONS: usize = 300;

/// Timers there can be: of each flow a few, and of each link.
const TIMERS: usize = 1000;

/// Bits of the byte before a frame: what of it is made right, so that what follows is looked at.
const HEADERS: u8 = 1;
const ADDRESSES: u8 = 2;
const LENGTHS: u8 = 4;
const CHECKSUM: u8 = 8;
const ACKNOWLEDGED: u8 = 16;
const SIX: u8 = 32;
const RESOLVER: u8 = 64;

/// The bytes of a run; zeros when there are no more.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn u8(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }
}

/// A guest and what it knows of the last TCP segment it was sent: the number it would acknowledge.
struct Sender {
    end: End,
    heard: [u8; 4],
}

/// Sends the frames that `data` describes; the clock runs and links are reset when it says so.
///
/// # Panics
/// If something happens that must not, which is what the fuzzer looks for.
pub fn frames(data: &[u8]) {
    let mut input = Input(data);
    with_net(|net| {
        let slow = Limits { bytes_per_s: 20_000, frames_per_s: 50, ..limits() };
        let groups = [(Some("red"), limits()), (Some("red"), slow), (None, limits())];
        let mut senders: Vec<_> = (2..)
            .zip(groups)
            .map(|(id, (group, limits))| Sender { end: attach(net, id, group, limits), heard: [0; 4] })
            .collect();
        for _ in 0..OPERATIONS {
            if input.0.is_empty() {
                break;
            }
            step(net, &mut senders, &mut input);
            settle(net);
            senders.iter().for_each(|sender| sender.end.check(net));
            assert!(net.timers() <= TIMERS, "{} timers", net.timers());
        }
        senders.into_iter().for_each(|sender| detach(net, sender.end));
    });
}

fn limits() -> Limits {
    Limits { flows: FLOWS, ..Limits::default() }
}

fn step(net: &mut Net, senders: &mut [Sender], input: &mut Input<'_>) {
    let kind = input.u8();
    let count = senders.len();
    let sender = &mut senders[usize::from(kind >> 4) % count];
    match kind & 15 {
        0 => net.now += Duration::from_millis(u64::from(input.u8()) * 40),
        1 => net.reset(sender.end.key),
        2 => {
            let rules = if input.u8() & 1 == 0 { Vec::new() } else { vec![resolvable()] };
            net.set_policy(sender.end.id, Policy { rules });
        }
        // What comes is left unread.
        3 => send(net, sender, input),
        _ => {
            send(net, sender, input);
            settle(net);
            senders.iter_mut().for_each(|sender| sender.listen(net));
        }
    }
}

/// Leads nowhere: no port is between 1 and 0.
fn resolvable() -> Rule {
    Rule { to: Destination::Name(ALLOWED.to_owned()), protocol: None, ports: vec![(1, 0)] }
}

fn send(net: &mut Net, sender: &Sender, input: &mut Input<'_>) {
    let (made, to, len) = (input.u8(), input.u8(), usize::from(input.u8()));
    let copies = if to & 0x80 == 0 { 1 } else { 20 };
    let body = input.bytes(len);
    let mut packet = if made & HEADERS == 0 { body.to_vec() } else { headers(sender, made, body) };
    // The end of the wire, which a device never sends for its guest.
    if packet.is_empty() {
        return;
    }
    if packet.len() > PAYLOAD {
        let own = sender.end.ipv4;
        make_right(&mut packet, made, to, own, sender.heard);
    }
    for _ in 0..copies {
        sender.end.send(net, &packet);
    }
}

/// Virtio and Ethernet headers before a payload.
fn headers(sender: &Sender, made: u8, payload: &[u8]) -> Vec<u8> {
    let kind = if made & SIX == 0 { IPV4 } else { IPV6 };
    let mut packet = vec![0; PAYLOAD];
    wire::link_header(&mut packet, GATEWAY_MAC, mac_of(sender.end.ipv4), kind);
    packet.extend_from_slice(payload);
    packet
}

fn make_right(packet: &mut [u8], made: u8, to: u8, own: Ipv4Addr, heard: [u8; 4]) {
    packet[VIRTIO + 6..VIRTIO + 12].copy_from_slice(&mac_of(own));
    let bytes = &mut packet[PAYLOAD..];
    let six = made & SIX != 0;
    let (start, protocol_at) = if six { (40, 6) } else { (20, 9) };
    if bytes.len() < start {
        return;
    }
    if made & ADDRESSES != 0 {
        addresses(bytes, six, to, own);
    }
    if made & LENGTHS != 0 {
        bytes[0] = if six { 0x60 } else { 0x45 };
        let (at, length) = if six { (4, bytes.len() - 40) } else { (2, bytes.len()) };
        bytes[at..at + 2].copy_from_slice(&(length as u16).to_be_bytes());
    }
    if bytes[protocol_at] == TCP && bytes.len() >= start + 20 {
        let segment = &mut bytes[start..];
        if made & RESOLVER != 0 {
            segment[..4].copy_from_slice(&[4, to & 3, 0, 53]);
        }
        if made & ACKNOWLEDGED != 0 {
            segment[8..12].copy_from_slice(&heard);
        }
    } else if made & RESOLVER != 0 && bytes.len() >= start + 8 {
        let length = ((bytes.len() - start) as u16).to_be_bytes();
        bytes[start + 2..start + 6].copy_from_slice(&[0, 53, length[0], length[1]]);
    }
    if made & CHECKSUM != 0 {
        checksums(bytes, six, start);
    }
}

fn addresses(bytes: &mut [u8], six: bool, to: u8, own: Ipv4Addr) {
    let four = match to % 8 {
        0..=2 => GATEWAY,
        3 => HOST,
        4 => Ipv4Addr::new(100, 100, 0, 2 + (to >> 3) % 4),
        5 => TEMPLATE,
        6 => Ipv4Addr::new(224, 0, 0, 1),
        _ => Ipv4Addr::new(1, 1, 1, 1),
    };
    if six {
        let target = if four == GATEWAY { GATEWAY_V6 } else { ipv6_of(four) };
        bytes[8..24].copy_from_slice(&ipv6_of(own).octets());
        bytes[24..40].copy_from_slice(&target.octets());
    } else {
        bytes[12..16].copy_from_slice(&own.octets());
        bytes[16..20].copy_from_slice(&four.octets());
    }
}

fn checksums(bytes: &mut [u8], six: bool, start: usize) {
    if !six {
        bytes[10..12].fill(0);
        let sum = internet_checksum(&bytes[..20]);
        bytes[10..12].copy_from_slice(&sum);
    }
    let (protocol, at) = match bytes[if six { 6 } else { 9 }] {
        wire::TCP => (wire::TCP, 16),
        wire::UDP => (wire::UDP, 6),
        other => (other, 2),
    };
    if bytes.len() < start + at + 2 {
        return;
    }
    bytes[start + at..start + at + 2].fill(0);
    let pseudo: Vec<u8> = match protocol {
        wire::ICMP => Vec::new(),
        _ => {
            let addresses = if six { &bytes[8..40] } else { &bytes[12..20] };
            let length = ((bytes.len() - start) as u32).to_be_bytes();
            [addresses, &length, &[0, 0, 0, protocol]].concat()
        }
    };
    let sum = internet_checksum(&[&pseudo[..], &bytes[start..]].concat());
    bytes[start + at..start + at + 2].copy_from_slice(&sum);
}

fn internet_checksum(bytes: &[u8]) -> [u8; 2] {
    let pairs = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = pairs.sum();
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

impl Sender {
    /// Reads all there is, and remembers where the other side of its TCP connection stands.
    fn listen(&mut self, net: &mut Net) {
        while let Some(packet) = self.end.receive(net) {
            let bytes = &packet[PAYLOAD..];
            let ip = match wire::be16(&packet, VIRTIO + 12) {
                IPV4 => wire::ipv4(bytes),
                IPV6 => wire::ipv6(bytes),
                _ => continue,
            };
            let Ok(ip) = ip else { continue };
            if let IpAddr::V4(v4) = ip.source {
                // Frames of the other guest of the group may claim nothing else.
                assert!(v4 != self.end.ipv4, "a frame of the guest's own");
            }
            let segment = &bytes[ip.start..ip.end];
            if ip.protocol == TCP {
                let header = usize::from(segment[12] >> 4) * 4;
                let ends = (segment.len() - header) as u32 + u32::from(segment[13] & 3 != 0);
                let number = u32::from_be_bytes([segment[4], segment[5], segment[6], segment[7]]);
                self.heard = number.wrapping_add(ends).to_be_bytes();
            }
        }
        settle(net);
    }
}
