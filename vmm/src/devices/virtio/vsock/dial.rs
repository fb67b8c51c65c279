//! Connections that the guest asks for: each waits until the host has a stream for it, or refuses.
//!
//! The process of a fork opens nothing itself. What it may ask is bounded, and a guest that may ask nothing is refused
//! without a question.

use std::fmt::Debug;
use std::os::fd::OwnedFd;

use super::connection::Connection;
use super::packet::{Header, Key};
use super::{Violation, Vsock};
use crate::devices::virtio::Queues;

/// Most questions without an answer; further connections are refused.
pub const MAX_DIALS: usize = 64;

/// Who finds streams for a guest that connects to the host.
pub trait HostPorts: Debug + Send {
    /// Asks for a stream to host port `port`, without waiting for it; the answer goes to [`Vsock::dialled`] with the same
    /// `token`. False: nobody can be asked.
    fn dial(&mut self, token: u64, port: u32) -> bool;
}

#[derive(Debug)]
struct Dial {
    token: u64,
    key: Key,
    request: Header,
}

/// Requests of the guest without an answer.
#[derive(Debug, Default)]
pub struct Dials {
    waiting: Vec<Dial>,
    /// Tokens are never used twice, so an answer that comes late finds nothing, even after a rewind.
    last_token: u64,
}

impl Dials {
    /// Whether the guest waits for none.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// How many wait.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether one with these ports waits.
    pub fn has(&self, key: Key) -> bool {
        self.waiting.iter().any(|dial| dial.key == key)
    }

    /// The guest does not wait any more.
    pub fn forget(&mut self, key: Key) {
        self.waiting.retain(|dial| dial.key != key);
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.waiting.clear();
    }

    fn take(&mut self, token: u64) -> Option<Dial> {
        let at = self.waiting.iter().position(|dial| dial.token == token)?;
        Some(self.waiting.swap_remove(at))
    }
}

impl Vsock {
    /// Offers host ports to the guest, until a rewind.
    pub fn offer_ports(&mut self, ports: Box<dyn HostPorts>) {
        self.ports = Some(ports);
    }

    /// The guest asks for a connection.
    pub(super) fn dial(&mut self, key: Key, request: &Header) {
        if self.line.accept(key, request) {
            return;
        }
        // A second request while the first one waits: no answer could tell them apart.
        let twice = self.dials.has(key);
        self.dials.forget(key);
        let room = !twice && self.table.has_room() && self.dials.waiting.len() < MAX_DIALS;
        self.dials.last_token += 1;
        let token = self.dials.last_token;
        let asked =
            self.ports.as_mut().filter(|_| room).is_some_and(|ports| ports.dial(token, key.host_port));
        if asked {
            self.dials.waiting.push(Dial { token, key, request: *request });
        } else {
            self.resets.push_back(key);
        }
    }

    /// The host's answer to a question: a connected stream, or none to refuse. Returns the connection's slot, to be watched
    /// next, if there is one.
    pub fn dialled(
        &mut self,
        queues: &mut Queues<'_>,
        token: u64,
        stream: Option<OwnedFd>,
    ) -> Result<Option<usize>, Violation> {
        let Some(Dial { key, request, .. }) = self.dials.take(token) else { return Ok(None) };
        let stream = stream.filter(|_| self.table.has_room());
        let slot = stream.map(|stream| self.table.insert(Connection::from_guest(key, stream, &request)));
        if slot.is_none() {
            self.resets.push_back(key);
        }
        self.fill_rx(queues)?;
        Ok(slot)
    }
}
