//! The line: a connection that the guest has made before it was frozen, and that each of its forks inherits.
//!
//! A connection made to a fork costs its guest a request, a socket and an acceptance, most of the time until its agent's
//! first answer. So the agent connects to the host once, while its template is built. Nobody is on the host's side: the
//! device accepts by itself, and the line is *at rest* until a stream for the same port is joined with it
//! ([`Vsock::connect`](super::Vsock::connect)). Nothing has flowed on a line at rest, so ports and the guest's credit are
//! all there is to save. One that was used ends with the machine, as any connection.

use super::packet::{Header, Key, op};
use super::state::LineState;

/// The line of a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Line {
    /// There is none, and will be none.
    #[default]
    None,
    /// The first connection to this host port will be it.
    Offered(u32),
    /// The guest has asked for it and is to be answered.
    Asked(Rest),
    /// It waits for a stream.
    AtRest(Rest),
}

/// A connection without a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rest {
    /// Its ports.
    pub key: Key,
    /// What the guest can take, in bytes.
    pub buffer: u32,
}

impl Line {
    /// Continues from a saved state.
    pub fn restore(state: Option<LineState>) -> Self {
        state.map_or(Self::None, |LineState { host_port, guest_port, buffer }| {
            Self::AtRest(Rest { key: Key { host_port, guest_port }, buffer })
        })
    }

    /// What a snapshot keeps of it.
    pub fn save(&self) -> Option<LineState> {
        match *self {
            Self::AtRest(Rest { key: Key { host_port, guest_port }, buffer }) => {
                Some(LineState { host_port, guest_port, buffer })
            }
            _ => None,
        }
    }

    /// The driver starts anew, which it does before its first connection, too.
    pub fn reset(&mut self) {
        if !matches!(self, Self::Offered(_)) {
            *self = Self::None;
        }
    }

    /// Whether the guest waits for the answer to its request.
    pub fn is_asked(&self) -> bool {
        matches!(self, Self::Asked(_))
    }

    /// Takes a request of the guest, if it is for the line.
    pub fn accept(&mut self, key: Key, request: &Header) -> bool {
        let wanted = *self == Self::Offered(key.host_port);
        if wanted {
            *self = Self::Asked(Rest { key, buffer: request.buf_alloc });
        }
        wanted
    }

    /// The answer to the guest's request, if one is due: what the host can take is `buffer` bytes.
    pub fn answer(&mut self, buffer: u32) -> Option<Header> {
        let Self::Asked(rest) = *self else { return None };
        *self = Self::AtRest(rest);
        Some(Header { buf_alloc: buffer, ..rest.key.header(op::RESPONSE) })
    }

    /// Whether packets with these ports are for it.
    pub fn has(&self, key: Key) -> bool {
        matches!(self, Self::Asked(rest) | Self::AtRest(rest) if rest.key == key)
    }

    /// A packet of the guest on the line. False: it breaks off the line, which has nobody to talk to yet.
    pub fn take(&mut self, header: &Header) -> bool {
        match self {
            Self::AtRest(rest) if header.op == op::CREDIT_UPDATE => {
                rest.buffer = header.buf_alloc;
                true
            }
            _ => {
                *self = Self::None;
                false
            }
        }
    }

    /// Gives the line away, if it is to `port` and at rest.
    pub fn claim(&mut self, port: u32) -> Option<Rest> {
        match *self {
            Self::AtRest(rest) if rest.key.host_port == port => {
                *self = Self::None;
                Some(rest)
            }
            _ => None,
        }
    }
}
