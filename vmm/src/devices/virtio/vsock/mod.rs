//! virtio-vsock (virtio 1.2, 5.10), streams only, its host side in this process.
//!
//! A host stream (a connected stream socket) is joined with a guest port by [`Vsock::connect`]; a guest that connects
//! to a host port waits until [`HostPorts`], which is asked for a stream, has an answer ([`Vsock::dialled`]). Everything
//! runs on the event loop's thread, except a reset by the driver, which closes all streams on a vCPU's.
//!
//! Packets for the guest go out in the order: resets, control packets, data, each kind in turn over the connections.
//! All are bounded: control packets are flags of their connection, resets are at most 256 (then the guest's
//! packets wait in its queue) plus one per connection or request, data stays in the host's socket until the guest has a buffer.
//!
//! The fast path of a new connection: REQUEST is put into the guest's queue and the interrupt raised before epoll
//! hears of the socket; when the guest accepts, the first bytes are read without waiting for epoll, and the guest's
//! answer is written likewise. One `epoll_ctl` per connection, one more when it ends.
//!
//! After a restore the guest is told by an event that its old connections are gone. Until it has dealt with that
//! (it gives the event's buffer back), it gets no packet: the Linux driver ends every connection it knows of at that
//! moment, new ones included.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use forkling_proto::rpc;
use mio::{Registry, Token};

use self::connection::{Connection, Gone, Phase, Readiness};
use self::dial::Dials;
use self::line::Line;
use self::packet::{GUEST_CID, Key};
use self::table::Table;
use super::{Queues, Violation, VirtioDevice, copy_config};
use crate::devices::Error;
use crate::protocol::{Opening, Passage};

pub mod connection;
mod dial;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod line;
pub mod packet;
mod rx;
pub mod state;
pub mod table;
#[cfg(test)]
mod tests;
mod tx;

pub use dial::HostPorts;
pub use state::VsockState;
pub use table::MAX_CONNECTIONS;

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

/// Event "all connections are gone" (5.10.6.7), its id and length.
const TRANSPORT_RESET: u32 = 0;
const EVENT_SIZE: usize = 4;

/// First port of host-made connections. Those below are left to services.
pub const FIRST_HOST_PORT: u32 = 1 << 30;

/// Resets that wait for the guest's queue before its packets are left alone.
const MAX_RESETS: usize = 256;

/// Most bytes moved in one step.
const SCRATCH: usize = 64 * 1024;

/// Host side of the device.
#[derive(Debug)]
pub struct Backend {
    /// The event loop's epoll.
    pub registry: Registry,
    /// First of [`MAX_CONNECTIONS`] tokens that are the device's.
    pub first_token: usize,
}

/// Why the host cannot connect to the guest. The stream is closed.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No driver.
    #[error("the guest does not drive its vsock device; wait for its agent")]
    NotReady,
    /// The table is full.
    #[error("the guest has {MAX_CONNECTIONS} connections, the most possible; close some")]
    TooMany,
    /// epoll refused the socket.
    #[error("the stream cannot be watched, it must be a stream socket: {0}")]
    Watch(std::io::Error),
}

/// Whether the guest may get packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gate {
    Open,
    /// The reset event is to be put into the event queue.
    Announce,
    /// The guest has the event; it adds a chain here when it has dealt with it.
    Await {
        position: u16,
    },
}

/// The device.
#[derive(Debug)]
pub struct Vsock {
    backend: Backend,
    table: Table,
    last_port: u32,
    gate: Gate,
    resets: VecDeque<Key>,
    /// Who is asked for host ports; without, the guest is refused.
    ports: Option<Box<dyn HostPorts>>,
    /// Connections the guest asked for and the host has not answered.
    dials: Dials,
    line: Line,
    /// What became of forwarded streams, and was not told yet.
    news: Vec<(u32, Passage)>,
    scratch: Vec<u8>,
}

impl Vsock {
    /// A device after power-on. Its line is the agent's, the first to connect.
    pub fn new(backend: Backend) -> Self {
        Self {
            backend,
            table: Table::default(),
            last_port: FIRST_HOST_PORT - 1,
            gate: Gate::Open,
            resets: VecDeque::new(),
            ports: None,
            dials: Dials::default(),
            line: Line::Offered(rpc::PORT),
            news: Vec::new(),
            scratch: Vec::new(),
        }
    }

    /// Continues from a saved state, without its connections but the line. Errors: what [`VsockState`] cannot be.
    pub fn restore(state: &VsockState, backend: Backend) -> Result<Self, Error> {
        let mut device = Self::new(backend);
        device.go_to(state)?;
        Ok(device)
    }

    fn go_to(&mut self, state: &VsockState) -> Result<(), Error> {
        state.validate()?;
        self.last_port = state.last_port;
        self.gate = if state.had_connections { Gate::Announce } else { Gate::Open };
        self.line = Line::restore(state.line.clone());
        Ok(())
    }

    /// The event loop's epoll.
    pub fn registry(&self) -> &Registry {
        &self.backend.registry
    }

    /// Joins `stream` with the line if that is to `port` and at rest and no opening is wanted, else asks the guest's `port` for a
    /// connection with it. Returns its slot, to be watched next.
    pub fn connect(
        &mut self,
        queues: &mut Queues<'_>,
        port: u32,
        stream: OwnedFd,
        opening: Opening,
    ) -> Result<Result<usize, ConnectError>, Violation> {
        if !self.table.has_room() {
            return Ok(Err(ConnectError::TooMany));
        }
        let line = if opening == Opening::Plain { self.line.claim(port) } else { None };
        let connection = match line {
            Some(rest) => Connection::on_line(rest, stream),
            None => Connection::to_guest(self.next_key(port), stream, opening),
        };
        let slot = self.table.insert(connection);
        self.fill_rx(queues)?;
        Ok(Ok(slot))
    }

    fn next_key(&mut self, guest_port: u32) -> Key {
        loop {
            // The last port, all ones, means "any" to Linux.
            let next = self.last_port + 1;
            self.last_port = if next == u32::MAX { FIRST_HOST_PORT } else { next };
            let key = Key { host_port: self.last_port, guest_port };
            if self.table.find(key).is_none() && !self.dials.has(key) {
                return key;
            }
        }
    }

    /// Has epoll watch the stream in `slot`, which may be gone again.
    pub fn watch(&mut self, slot: usize) -> Result<(), ConnectError> {
        let Some(connection) = self.table.get(slot) else { return Ok(()) };
        let watched = connection.watch(&self.backend.registry, Token(self.backend.first_token + slot));
        watched.map_err(|error| {
            self.abort(slot);
            ConnectError::Watch(error)
        })
    }

    /// epoll's news of the stream in `slot`.
    pub fn on_ready(
        &mut self,
        queues: &mut Queues<'_>,
        slot: usize,
        ready: Readiness,
    ) -> Result<(), Violation> {
        if let Some(connection) = self.table.get(slot) {
            match connection.on_ready(ready) {
                Err(Gone) => self.abort(slot),
                Ok(()) if connection.phase() == Phase::Draining && !connection.is_buffering() => {
                    self.close(slot)
                }
                Ok(()) => self.table.schedule(slot),
            }
        }
        self.fill_rx(queues)
    }

    /// Ends a connection for the host.
    fn close(&mut self, slot: usize) {
        if let Some(mut connection) = self.table.remove(slot) {
            connection.unwatch(&self.backend.registry);
            self.news.extend(connection.passed());
        }
    }

    /// Ends the forwarded streams of a group for both sides.
    pub fn cut(&mut self, queues: &mut Queues<'_>, group: u32) -> Result<(), Violation> {
        for slot in self.table.of_group(group) {
            self.abort(slot);
        }
        self.fill_rx(queues)
    }

    /// What became of forwarded streams since the last call.
    pub fn take_news(&mut self) -> Vec<(u32, Passage)> {
        std::mem::take(&mut self.news)
    }

    /// Ends a connection for both sides.
    fn abort(&mut self, slot: usize) {
        if let Some(connection) = self.table.get(slot)
            && matches!(connection.phase(), Phase::Requested | Phase::Open)
        {
            self.resets.push_back(connection.key());
        }
        self.close(slot);
    }
}

/// The first `len` bytes of `scratch`, which grows with need: a fork that moves little touches little memory.
fn at_least(scratch: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if scratch.len() < len {
        scratch.resize(len, 0);
    }
    &mut scratch[..len]
}

impl VirtioDevice for Vsock {
    type State = VsockState;

    const ID: u32 = 19;
    const QUEUE_SIZES: &'static [u16] = &[256, 256, 16];
    // An answer to what the guest sent mostly follows, and interrupts it anyway.
    const LAZY_QUEUES: u32 = 1 << TX;

    fn features(&self) -> u64 {
        // None means streams only.
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&GUEST_CID.to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, offset: u64, _data: &[u8]) -> Result<(), Violation> {
        Err(Violation::Config(offset))
    }

    fn activate(&mut self) {}

    fn reset(&mut self) {
        for mut connection in self.table.clear() {
            connection.unwatch(&self.backend.registry);
            self.news.extend(connection.passed());
        }
        self.resets.clear();
        self.dials.clear();
        self.line.reset();
        self.gate = Gate::Open;
    }

    fn process(&mut self, queues: &mut Queues<'_>) -> Result<(), Violation> {
        self.send_events(queues)?;
        loop {
            let packets_left = self.drain_tx(queues)?;
            self.fill_rx(queues)?;
            if !packets_left || self.resets.len() >= MAX_RESETS {
                return Ok(());
            }
        }
    }

    fn save(&self) -> VsockState {
        // Streams and what waits for them are the host's; scratch is between two steps never in use.
        let Self { backend: _, table, last_port, gate, resets, dials, line, ports: _, news: _, scratch: _ } =
            self;
        let had_connections = !table.is_empty()
            || !resets.is_empty()
            || !dials.is_empty()
            || line.is_asked()
            || *gate != Gate::Open;
        let line = if had_connections { None } else { line.save() };
        VsockState { last_port: *last_port, had_connections, line }
    }

    fn rewind(&mut self, state: &VsockState) -> Result<(), Error> {
        // What the host offered and who counts was for the life before.
        self.ports = None;
        self.news.clear();
        self.go_to(state)
    }
}
