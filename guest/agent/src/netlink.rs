//! Requests to the kernel's routing socket (rtnetlink(7)), as many in one go as there are.
//!
//! Written out by hand, because a fork sends some on the way to its acknowledgement: a dozen stores into a buffer that
//! was there before, and two system calls.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

const NEW_LINK: u16 = 16;
const NEW_ADDRESS: u16 = 20;
const DELETE_ADDRESS: u16 = 21;
const NEW_ROUTE: u16 = 24;
/// `NLMSG_ERROR`: the only answer to a request that asks for none.
const ERROR: u16 = 2;

const REQUEST: u16 = 1;
const REPLACE: u16 = 0x100;
const CREATE: u16 = 0x400;

/// `IFF_UP`, and `IFF_NOARP`: there is one neighbour, and it takes every frame, so nobody has to be looked for.
const UP_WITHOUT_ARP: u32 = 0x1 | 0x80;

const LINK_ADDRESS: u16 = 1;
const ADDRESS: u16 = 1;
const LOCAL: u16 = 2;
const ADDRESS_FLAGS: u16 = 8;
const ROUTE_DEVICE: u16 = 4;
const ROUTE_GATEWAY: u16 = 5;

/// `IFA_F_NODAD | IFA_F_NOPREFIXROUTE`: usable at once, and nothing else is on the link.
const PLAIN: u32 = 0x02 | 0x200;
/// `RTNH_F_ONLINK`: the gateway needs no route of its own.
const ONLINK: u32 = 4;
/// `RT_TABLE_MAIN`, `RTPROT_STATIC`, `RT_SCOPE_UNIVERSE`, `RTN_UNICAST`.
const MAIN_STATIC_UNICAST: [u8; 4] = [254, 4, 0, 1];

const HEADER: usize = 16;

/// A routing socket with the requests for its next send.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    requests: Vec<u8>,
}

impl Netlink {
    /// A socket without requests.
    pub fn open() -> io::Result<Self> {
        // Protocol 0 is NETLINK_ROUTE.
        let socket =
            rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        Ok(Self { socket, requests: Vec::with_capacity(512) })
    }

    /// Brings device `index` up, as the end of a wire that leads to one neighbour only.
    pub fn bring_up(&mut self, index: u32) {
        self.request(NEW_LINK, 0, |body| link(body, index, UP_WITHOUT_ARP));
    }

    /// Gives device `index` the MAC address `mac`.
    pub fn set_mac(&mut self, index: u32, mac: [u8; 6]) {
        self.request(NEW_LINK, 0, |body| {
            link(body, index, 0);
            attribute(body, LINK_ADDRESS, &mac);
        });
    }

    /// Gives device `index` an address of a single host.
    pub fn add_address(&mut self, index: u32, address: IpAddr) {
        self.request(NEW_ADDRESS, CREATE | REPLACE, |body| {
            host_address(body, index, address);
            attribute(body, ADDRESS_FLAGS, &PLAIN.to_ne_bytes());
        });
    }

    /// Takes an address from device `index`.
    pub fn remove_address(&mut self, index: u32, address: IpAddr) {
        self.request(DELETE_ADDRESS, 0, |body| host_address(body, index, address));
    }

    /// Routes everything of the gateway's family through `gateway` on device `index`.
    pub fn add_default_route(&mut self, index: u32, gateway: IpAddr) {
        self.request(NEW_ROUTE, CREATE | REPLACE, |body| {
            // struct rtmsg: family, lengths of destination and source, type of service, table to type, flags.
            body.extend([family(gateway), 0, 0, 0]);
            body.extend(MAIN_STATIC_UNICAST);
            body.extend(ONLINK.to_ne_bytes());
            attribute(body, ROUTE_DEVICE, &index.to_ne_bytes());
            with_bytes(gateway, |bytes| attribute(body, ROUTE_GATEWAY, bytes));
        });
    }

    /// Sends the requests; the kernel carries them out one by one before it returns.
    ///
    /// # Errors
    /// The kernel's for the first request that it refused.
    pub fn send(&mut self) -> io::Result<()> {
        let sent = rustix::net::send(&self.socket, &self.requests, SendFlags::empty());
        self.requests.clear();
        sent?;
        let mut answer = [0; 256];
        match rustix::net::recv(&self.socket, &mut answer[..], RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN) => Ok(()),
            Err(errno) => Err(errno.into()),
            Ok((_, len)) => refusal(&answer[..len.min(answer.len())]),
        }
    }

    /// Adds a request with the body that `write` makes.
    fn request(&mut self, kind: u16, flags: u16, write: impl FnOnce(&mut Vec<u8>)) {
        let start = self.requests.len();
        // struct nlmsghdr: length, type, flags, sequence number, port.
        self.requests.extend([0; 4]);
        self.requests.extend(kind.to_ne_bytes());
        self.requests.extend((REQUEST | flags).to_ne_bytes());
        self.requests.extend([0; 8]);
        write(&mut self.requests);
        let len = (self.requests.len() - start) as u32;
        self.requests[start..start + 4].copy_from_slice(&len.to_ne_bytes());
    }
}

/// struct ifinfomsg: family, type, index, flags, mask of flags to change.
fn link(body: &mut Vec<u8>, index: u32, flags: u32) {
    body.extend([0; 4]);
    body.extend(index.to_ne_bytes());
    body.extend(flags.to_ne_bytes());
    body.extend(flags.to_ne_bytes());
}

/// struct ifaddrmsg (family, length of the prefix, flags, scope, index) and the address.
fn host_address(body: &mut Vec<u8>, index: u32, address: IpAddr) {
    let whole = if address.is_ipv4() { 32 } else { 128 };
    body.extend([family(address), whole, 0, 0]);
    body.extend(index.to_ne_bytes());
    with_bytes(address, |bytes| {
        attribute(body, LOCAL, bytes);
        attribute(body, ADDRESS, bytes);
    });
}

fn family(address: IpAddr) -> u8 {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    family as u8
}

fn with_bytes(address: IpAddr, work: impl FnOnce(&[u8])) {
    match address {
        IpAddr::V4(address) => work(&address.octets()),
        IpAddr::V6(address) => work(&address.octets()),
    }
}

/// struct rtattr: length and type, then the value, padded to four bytes.
fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    body.extend((4 + value.len() as u16).to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// The kernel's error in an answer: struct nlmsgerr behind the header, negative.
fn refusal(answer: &[u8]) -> io::Result<()> {
    let field =
        |at: usize| answer.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    let kind = answer.get(4..6).map(|bytes| u16::from_ne_bytes([bytes[0], bytes[1]]));
    match (kind, field(HEADER)) {
        (Some(ERROR), Some(0)) => Ok(()),
        (Some(ERROR), Some(error)) => Err(io::Error::from_raw_os_error(-error)),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests;
