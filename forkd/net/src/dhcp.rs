//! DHCP (RFC 2131): a guest that asks is told what it is.

use std::net::Ipv4Addr;

use forkling_proto::network::{GATEWAY, MTU};

use crate::wire;

const COOKIE: [u8; 4] = [99, 130, 83, 99];
const OPTIONS: usize = 240;
const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;

/// The answer to a message from port 68 to port 67; `None` if it is none that is answered.
pub fn answer(mac: [u8; 6], guest: Ipv4Addr, request: &[u8]) -> Option<Vec<u8>> {
    let is_request = request.len() >= OPTIONS && request[0] == 1 && request[236..OPTIONS] == COOKIE;
    if !is_request || request[28..34] != mac {
        return None;
    }
    let kind = match option(&request[OPTIONS..], 53)? {
        [DISCOVER] => OFFER,
        [REQUEST] => ACK,
        _ => return None,
    };
    let mut reply = vec![0; OPTIONS];
    reply[..4].copy_from_slice(&[2, 1, 6, 0]);
    reply[4..8].copy_from_slice(&request[4..8]);
    reply[10..12].copy_from_slice(&request[10..12]);
    reply[16..20].copy_from_slice(&guest.octets());
    reply[20..24].copy_from_slice(&GATEWAY.octets());
    reply[28..34].copy_from_slice(&mac);
    reply[236..].copy_from_slice(&COOKIE);
    let gateway = GATEWAY.octets();
    // Message type, server, lease (for ever), mask, router, resolver, MTU, and routes (RFC 3442): one to the gateway
    // without a router, and all others by it, since the address is that of a single host.
    for (code, value) in [
        (53, &[kind][..]),
        (54, &gateway),
        (51, &[0xff; 4]),
        (1, &[0xff; 4]),
        (3, &gateway),
        (6, &gateway),
        (26, &MTU.to_be_bytes()),
        (121, &[&[32][..], &gateway, &[0; 4], &[0], &gateway].concat()),
    ] {
        reply.extend_from_slice(&[code, value.len() as u8]);
        reply.extend_from_slice(value);
    }
    reply.push(255);
    wire::udp(mac, (GATEWAY.into(), 67), (Ipv4Addr::BROADCAST.into(), 68), &reply)
}

fn option(mut options: &[u8], wanted: u8) -> Option<&[u8]> {
    loop {
        match options {
            [0, rest @ ..] => options = rest,
            [code, length, rest @ ..] if *code != 255 => {
                let value = rest.get(..usize::from(*length))?;
                if *code == wanted {
                    return Some(value);
                }
                options = &rest[value.len()..];
            }
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests;
