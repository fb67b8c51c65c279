//! Packets: what is read of those of guests, and those made for them.
//!
//! A packet is `virtio_net_hdr_v1`, Ethernet header, and payload, all in one slice.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use forkling_proto::network::GATEWAY_MAC;

#[cfg(test)]
mod tests;

/// Bytes of the virtio header.
pub const VIRTIO: usize = 12;
/// Where the Ethernet payload begins.
pub const PAYLOAD: usize = VIRTIO + 14;

/// EtherTypes.
pub const ARP: u16 = 0x0806;
/// IPv4.
pub const IPV4: u16 = 0x0800;
/// IPv6.
pub const IPV6: u16 = 0x86dd;

/// IP protocol numbers.
pub const ICMP: u8 = 1;
/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// ICMPv6.
pub const ICMPV6: u8 = 58;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum is left to the receiver.
pub const NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_F_DATA_VALID`: checksums were verified, or were never needed.
const DATA_VALID: u8 = 2;
/// TCP segmentation of IPv4 and IPv6 (`gso_type` without its ECN bit 0x80).
const GSO: [u8; 3] = [0, 1, 4];

/// Why a packet is not looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bad {
    /// Its lengths, checksum or fields are wrong.
    Malformed,
    /// A fragment.
    Fragment,
    /// Of a kind that any guest sends and nobody here listens to.
    Unheard,
}

/// An IP packet, verified in its lengths. Offsets are in the slice that begins with its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ip {
    /// Source.
    pub source: IpAddr,
    /// Destination.
    pub destination: IpAddr,
    /// IP protocol.
    pub protocol: u8,
    /// Where its payload begins.
    pub start: usize,
    /// Where it ends; what follows is padding.
    pub end: usize,
}

/// Two bytes of a slice that is long enough.
pub fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn v6_at(bytes: &[u8], at: usize) -> Ipv6Addr {
    let mut octets = [0; 16];
    octets.copy_from_slice(&bytes[at..at + 16]);
    octets.into()
}

/// Whether the virtio header of a packet, at least [`PAYLOAD`] bytes long, means what another guest may be given.
pub fn header_is_sane(packet: &[u8]) -> bool {
    let (flags, gso) = (packet[0], packet[1] & !0x80);
    let le16 = |at| usize::from(u16::from_le_bytes([packet[at], packet[at + 1]]));
    let checksum_end = VIRTIO + le16(6) + le16(8) + 2;
    let checksum = flags & NEEDS_CSUM == 0 || (le16(6) >= PAYLOAD - VIRTIO && checksum_end <= packet.len());
    let segments = gso == 0 || (flags & NEEDS_CSUM != 0 && le16(4) >= 64 && le16(2) + VIRTIO <= packet.len());
    flags & !(NEEDS_CSUM | DATA_VALID) == 0 && GSO.contains(&gso) && checksum && segments
}

/// Reads an IPv4 header (RFC 791). Options are refused: nothing they are for exists here.
pub fn ipv4(bytes: &[u8]) -> Result<Ip, Bad> {
    if bytes.len() < 20 || bytes[0] >> 4 != 4 {
        return Err(Bad::Malformed);
    }
    let destination = Ipv4Addr::new(bytes[16], bytes[17], bytes[18], bytes[19]);
    if bytes[0] != 0x45 {
        return Err(if bytes[9] == 2 { Bad::Unheard } else { Bad::Malformed });
    }
    let end = usize::from(be16(bytes, 2));
    if !(20..=bytes.len()).contains(&end) || fold(sum(&bytes[..20], 0)) != 0xffff {
        return Err(Bad::Malformed);
    }
    if be16(bytes, 6) & 0x3fff != 0 {
        return Err(Bad::Fragment);
    }
    let source = Ipv4Addr::new(bytes[12], bytes[13], bytes[14], bytes[15]);
    let ip =
        Ip { source: source.into(), destination: destination.into(), protocol: bytes[9], start: 20, end };
    check_payload(bytes, ip)
}

/// Reads an IPv6 header (RFC 8200). Extension headers are refused, fragments by their name.
pub fn ipv6(bytes: &[u8]) -> Result<Ip, Bad> {
    if bytes.len() < 40 || bytes[0] >> 4 != 6 {
        return Err(Bad::Malformed);
    }
    let (source, destination) = (v6_at(bytes, 8), v6_at(bytes, 24));
    match bytes[6] {
        44 => return Err(Bad::Fragment),
        // Reports of multicast listeners.
        0 if destination.is_multicast() => return Err(Bad::Unheard),
        0 | 43 | 60 | 135 => return Err(Bad::Malformed),
        _ => {}
    }
    let end = 40 + usize::from(be16(bytes, 4));
    if end > bytes.len() {
        return Err(Bad::Malformed);
    }
    let ip =
        Ip { source: source.into(), destination: destination.into(), protocol: bytes[6], start: 40, end };
    check_payload(bytes, ip)
}

fn check_payload(bytes: &[u8], ip: Ip) -> Result<Ip, Bad> {
    let payload = &bytes[ip.start..ip.end];
    let fits = match ip.protocol {
        TCP => payload.len() >= 20 && (20..=payload.len()).contains(&(usize::from(payload[12] >> 4) * 4)),
        UDP => payload.len() >= 8 && (8..=payload.len()).contains(&usize::from(be16(payload, 4))),
        ICMP | ICMPV6 => payload.len() >= 8,
        _ => true,
    };
    if fits { Ok(ip) } else { Err(Bad::Malformed) }
}

/// Internet checksum (RFC 1071), before folding.
fn sum(bytes: &[u8], start: u64) -> u64 {
    let chunks = bytes.chunks_exact(4);
    let rest = chunks.remainder();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    chunks.map(|c| u64::from(be32(c, 0))).sum::<u64>() + u64::from(u32::from_be_bytes(last)) + start
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Checksum of an upper-layer packet with its pseudo header; its own field is zero.
pub fn checksum(source: IpAddr, destination: IpAddr, protocol: u8, payload: &[u8]) -> u16 {
    let pseudo = match (source, destination, protocol) {
        (_, _, ICMP) => 0,
        (IpAddr::V4(s), IpAddr::V4(d), _) => {
            sum(&s.octets(), sum(&d.octets(), u64::from(protocol) + payload.len() as u64))
        }
        (s, d, _) => sum(&octets(s), sum(&octets(d), u64::from(protocol) + payload.len() as u64)),
    };
    !fold(sum(payload, pseudo))
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// Whether the checksum of an upper-layer packet is right.
pub fn checksum_is_right(ip: &Ip, bytes: &[u8]) -> bool {
    checksum(ip.source, ip.destination, ip.protocol, &bytes[ip.start..ip.end]) == 0
}

/// Writes virtio and Ethernet headers.
pub fn link_header(packet: &mut [u8], to: [u8; 6], from: [u8; 6], kind: u16) {
    packet[..VIRTIO].fill(0);
    packet[0] = DATA_VALID;
    packet[VIRTIO..VIRTIO + 6].copy_from_slice(&to);
    packet[VIRTIO + 6..VIRTIO + 12].copy_from_slice(&from);
    packet[VIRTIO + 12..PAYLOAD].copy_from_slice(&kind.to_be_bytes());
}

/// A packet of the gateway around an upper-layer packet, whose checksum is written at `checksum_at`.
///
/// `None`: the addresses are of different families, or it is too long.
pub fn packet(
    mac: [u8; 6],
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    checksum_at: usize,
    payload: &[u8],
) -> Option<Vec<u8>> {
    let mut bytes = vec![0; PAYLOAD];
    match (source, destination) {
        (IpAddr::V4(s), IpAddr::V4(d)) => {
            let length = u16::try_from(payload.len() + 20).ok()?;
            link_header(&mut bytes, mac, GATEWAY_MAC, IPV4);
            let mut header = [0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            header[2..4].copy_from_slice(&length.to_be_bytes());
            header[12..16].copy_from_slice(&s.octets());
            header[16..20].copy_from_slice(&d.octets());
            let check = !fold(sum(&header, 0));
            header[10..12].copy_from_slice(&check.to_be_bytes());
            bytes.extend_from_slice(&header);
        }
        (IpAddr::V6(s), IpAddr::V6(d)) => {
            link_header(&mut bytes, mac, GATEWAY_MAC, IPV6);
            bytes.extend_from_slice(&[0x60, 0, 0, 0]);
            bytes.extend_from_slice(&u16::try_from(payload.len()).ok()?.to_be_bytes());
            // Neighbour discovery is believed with this hop limit only (RFC 4861, 7.1).
            bytes.extend_from_slice(&[protocol, 255]);
            bytes.extend_from_slice(&s.octets());
            bytes.extend_from_slice(&d.octets());
        }
        _ => return None,
    }
    let start = bytes.len();
    bytes.extend_from_slice(payload);
    let check = match checksum(source, destination, protocol, payload) {
        0 if protocol == UDP => 0xffff,
        check => check,
    };
    bytes.get_mut(start + checksum_at..start + checksum_at + 2)?.copy_from_slice(&check.to_be_bytes());
    Some(bytes)
}

/// A UDP packet.
pub fn udp(mac: [u8; 6], source: (IpAddr, u16), destination: (IpAddr, u16), data: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(data.len() + 8).ok()?;
    let mut payload = Vec::with_capacity(usize::from(length));
    for field in [source.1, destination.1, length, 0] {
        payload.extend_from_slice(&field.to_be_bytes());
    }
    payload.extend_from_slice(data);
    packet(mac, source.0, destination.0, UDP, 6, &payload)
}

/// The reset that answers a TCP segment (RFC 9293, 3.10.7.1); `None` for a reset.
pub fn reset(mac: [u8; 6], ip: &Ip, bytes: &[u8]) -> Option<Vec<u8>> {
    let segment = &bytes[ip.start..ip.end];
    let flags = segment[13];
    if flags & 4 != 0 {
        return None;
    }
    let mut answer = [0; 20];
    answer[0..2].copy_from_slice(&segment[2..4]);
    answer[2..4].copy_from_slice(&segment[0..2]);
    answer[12] = 0x50;
    if flags & 0x10 != 0 {
        answer[4..8].copy_from_slice(&segment[8..12]);
        answer[13] = 4;
    } else {
        let data = segment.len() - usize::from(segment[12] >> 4) * 4;
        let length = data as u32 + u32::from(flags >> 1 & 1) + u32::from(flags & 1);
        answer[8..12].copy_from_slice(&be32(segment, 4).wrapping_add(length).to_be_bytes());
        answer[13] = 0x14;
    }
    packet(mac, ip.destination, ip.source, TCP, 16, &answer)
}

/// Why a flow does not come about, as ICMP tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreachable {
    /// Network or host.
    Host,
    /// Port.
    Port,
    /// Prohibited.
    Prohibited,
}

/// The ICMP error that answers an IP packet (RFC 792, RFC 4443). It is the gateway's, or for ports the destination's.
pub fn unreachable(
    mac: [u8; 6],
    gateway: IpAddr,
    ip: &Ip,
    bytes: &[u8],
    why: Unreachable,
) -> Option<Vec<u8>> {
    let (protocol, kind, code) = match (ip.source, why) {
        (IpAddr::V4(_), Unreachable::Host) => (ICMP, 3, 1),
        (IpAddr::V4(_), Unreachable::Port) => (ICMP, 3, 3),
        (IpAddr::V4(_), Unreachable::Prohibited) => (ICMP, 3, 13),
        (IpAddr::V6(_), Unreachable::Host) => (ICMPV6, 1, 0),
        (IpAddr::V6(_), Unreachable::Port) => (ICMPV6, 1, 4),
        (IpAddr::V6(_), Unreachable::Prohibited) => (ICMPV6, 1, 1),
    };
    let mut payload = vec![kind, code, 0, 0, 0, 0, 0, 0];
    payload.extend_from_slice(&bytes[..ip.end.min(ip.start + 8)]);
    let from = if why == Unreachable::Port { ip.destination } else { gateway };
    packet(mac, from, ip.source, protocol, 2, &payload)
}
