//! The kernel's table of connections, by netlink (linux/netfilter/nfnetlink_conntrack.h). Each connection of a guest bears
//! the number of its tap as mark.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with, sockopt,
};

/// Longest answer in one packet: the kernel's dumps come in pieces of at most this many bytes.
const ANSWER: usize = 64 << 10;

/// How long the kernel may take.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);

const HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;

// linux/netlink.h
const ERROR: u16 = 2;
const DONE: u16 = 3;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const TYPE_MASK: u16 = 0x3fff;
const NESTED: u16 = 0x8000;

// NFNL_SUBSYS_CTNETLINK in the high byte.
const NEW: u16 = 0x100;
const GET: u16 = 0x101;
const DELETE: u16 = 0x102;

const TUPLE_ORIGINAL: u16 = 1;
const MARK: u16 = 8;
const MARK_MASK: u16 = 21;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const V4_DESTINATION: u16 = 2;
const V6_DESTINATION: u16 = 4;
const PROTOCOL_NUMBER: u16 = 1;
const PORT_DESTINATION: u16 = 3;

/// A connection of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Where it leads.
    pub to: IpAddr,
    /// By which protocol (IANA number).
    pub protocol: u8,
    /// The port there, if the protocol has ports.
    pub port: Option<u16>,
    family: u8,
    /// As the kernel told it, to name it again.
    tuple: Vec<u8>,
}

/// The table of the network namespace in which it was opened.
#[derive(Debug)]
pub struct Connections(OwnedFd);

impl Connections {
    /// Opens it for the thread's namespace.
    pub fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::NETFILTER))?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PATIENCE))?;
        Ok(Self(socket))
    }

    /// Those with a mark.
    pub fn list(&self, mark: u32) -> io::Result<Vec<Connection>> {
        let mut found = Vec::new();
        self.request(GET, DUMP, 0, &marked(mark), |family, attributes| {
            found.extend(connection(family, attributes));
        })?;
        Ok(found)
    }

    /// Forgets all with a mark.
    pub fn cut_all(&self, mark: u32) -> io::Result<()> {
        self.request(DELETE, ACK, 0, &marked(mark), |_, _| {})
    }

    /// Forgets one. One that has ended by itself is no error.
    pub fn cut(&self, connection: &Connection) -> io::Result<()> {
        let tuple = attribute(TUPLE_ORIGINAL | NESTED, &connection.tuple);
        match self.request(DELETE, ACK, connection.family, &tuple, |_, _| {}) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            outcome => outcome,
        }
    }

    fn request(
        &self,
        kind: u16,
        flags: u16,
        family: u8,
        attributes: &[u8],
        mut hear: impl FnMut(u8, &[u8]),
    ) -> io::Result<()> {
        let len = u32::try_from(HEADER + FAMILY_HEADER + attributes.len()).map_err(io::Error::other)?;
        let mut message = Vec::new();
        message.extend(len.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend((REQUEST | flags).to_ne_bytes());
        message.extend([0; 8]);
        message.extend([family, 0, 0, 0]);
        message.extend(attributes);
        send(&self.0, &message, SendFlags::empty())?;
        let mut buffer = vec![0; ANSWER];
        loop {
            let (got, _) = recv(&self.0, &mut buffer[..], RecvFlags::empty())?;
            let mut rest = &buffer[..got];
            while let Some((kind, body, next)) = message_of(rest) {
                rest = next;
                match kind {
                    DONE => return Ok(()),
                    ERROR => return status(body),
                    NEW if body.len() >= FAMILY_HEADER => hear(body[0], &body[FAMILY_HEADER..]),
                    _ => {}
                }
            }
        }
    }
}

/// Type, body, and what follows.
fn message_of(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let body = bytes.get(HEADER..len)?;
    Some((kind, body, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

fn status(body: &[u8]) -> io::Result<()> {
    let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) }
}

fn marked(mark: u32) -> Vec<u8> {
    [attribute(MARK, &mark.to_be_bytes()), attribute(MARK_MASK, &u32::MAX.to_be_bytes())].concat()
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = 4 + value.len();
    let mut bytes = Vec::with_capacity(len.next_multiple_of(4));
    // A tuple is some sixty bytes long.
    bytes.extend((len as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(len.next_multiple_of(4), 0);
    bytes
}

/// The value of the first attribute of a kind.
fn find(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let len = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & TYPE_MASK;
        let value = bytes.get(4..len)?;
        if kind == wanted {
            return Some(value);
        }
        bytes = bytes.get(len.next_multiple_of(4)..)?;
    }
}

fn connection(family: u8, attributes: &[u8]) -> Option<Connection> {
    let tuple = find(attributes, TUPLE_ORIGINAL)?;
    let (addresses, protocol) = (find(tuple, TUPLE_IP)?, find(tuple, TUPLE_PROTOCOL)?);
    let v4 = find(addresses, V4_DESTINATION).and_then(|value| <[u8; 4]>::try_from(value).ok());
    let v6 = find(addresses, V6_DESTINATION).and_then(|value| <[u8; 16]>::try_from(value).ok());
    let to = v4.map(|v4| Ipv4Addr::from(v4).into()).or(v6.map(|v6| Ipv6Addr::from(v6).into()))?;
    let port = find(protocol, PORT_DESTINATION).and_then(|value| <[u8; 2]>::try_from(value).ok());
    Some(Connection {
        to,
        protocol: *find(protocol, PROTOCOL_NUMBER)?.first()?,
        port: port.map(u16::from_be_bytes),
        family,
        tuple: tuple.to_vec(),
    })
}

#[cfg(test)]
mod tests;
