//! ICMP echo and neighbour discovery.

use std::net::{IpAddr, Ipv6Addr};

use forkling_proto::network::{GATEWAY_MAC, GATEWAY_V6};

use crate::{
    flow::FlowId,
    wire::{self, ICMP, ICMPV6, Ip},
};

/// Type of an echo request, and of its reply.
pub const fn echo_types(v6: bool) -> (u8, u8) {
    if v6 { (128, 129) } else { (8, 0) }
}

/// The reply of whoever was asked, if this is an echo request.
pub fn echo(mac: [u8; 6], ip: &Ip, bytes: &[u8]) -> Option<Vec<u8>> {
    let (request, reply) = echo_types(ip.source.is_ipv6());
    let mut payload = bytes[ip.start..ip.end].to_vec();
    if payload[0] != request || payload[1] != 0 {
        return None;
    }
    payload[0] = reply;
    payload[2..4].fill(0);
    wire::packet(mac, ip.destination, ip.source, ip.protocol, 2, &payload)
}

/// A reply that came to a ping socket, for the guest: its identifier is put back.
pub fn reply(mac: [u8; 6], id: &FlowId, guest: IpAddr, data: &mut [u8]) -> Option<Vec<u8>> {
    let v6 = id.remote.is_ipv6();
    if data.len() < 8 || data[0] != echo_types(v6).1 {
        return None;
    }
    data[2..4].fill(0);
    data[4..6].copy_from_slice(&id.port.to_be_bytes());
    wire::packet(mac, id.remote, guest, if v6 { ICMPV6 } else { ICMP }, 2, data)
}

/// The gateway's answer to a neighbour solicitation (RFC 4861): whoever is sought, frames for it go to the gateway.
pub fn neighbour(mac: [u8; 6], own: Ipv6Addr, ip: &Ip, bytes: &[u8]) -> Option<Vec<u8>> {
    let payload = &bytes[ip.start..ip.end];
    if payload.len() < 24 || payload[0] != 135 || payload[1] != 0 {
        return None;
    }
    let mut sought = [0; 16];
    sought.copy_from_slice(&payload[8..24]);
    // Its own address is sought by a guest that looks for duplicates.
    if Ipv6Addr::from(sought) == own || Ipv6Addr::from(sought).is_multicast() {
        return None;
    }
    let IpAddr::V6(source) = ip.source else { return None };
    if source.is_unspecified() {
        return None;
    }
    // Router, solicited, override; then the target and its link-layer address.
    let mut answer = vec![136, 0, 0, 0, 0xe0, 0, 0, 0];
    answer.extend_from_slice(&sought);
    answer.extend_from_slice(&[2, 1]);
    answer.extend_from_slice(&GATEWAY_MAC);
    wire::packet(mac, IpAddr::V6(GATEWAY_V6), IpAddr::V6(source), ICMPV6, 2, &answer)
}
