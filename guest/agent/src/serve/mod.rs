//! The server: one thread, one epoll set, any number of RPC connections, commands and forwarded streams.
//!
//! Every buffer is bounded. A host that does not read stops its commands' outputs, not the agent; a command that does
//! not read its input stops the connection it came from, until it reads, ends, or the connection is closed.

mod call;
mod connection;
mod forward;
mod requests;
mod splice;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use forkling_proto::rpc::Kind;
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::SocketFlags;
use rustix::process::RawPid;

use crate::command::Environment;
use crate::forkpoint::{self, Forkpoint};
use crate::reap::Reaper;
use call::Call;
use connection::{Connection, Fill};
use forward::Forward;

/// Most connections at a time; further ones are closed at once.
const MAX_CONNECTIONS: usize = 256;

/// Most commands at a time.
const MAX_CALLS: usize = 4096;

/// Bytes read from a command's output at once, one frame.
const CHUNK: usize = 64 * 1024;

/// Why the server cannot go on; the guest is of no use then.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused what the server cannot do without.
    #[error("the agent cannot {0}")]
    System(&'static str, #[source] io::Error),
    /// The first forkpoint cannot be reached.
    #[error(transparent)]
    Prepare(#[from] forkpoint::PrepareError),
}

/// What an event is about; the low bits of its token.
const LISTENER: u64 = 0;
const CHILDREN: u64 = 1;
const CONNECTION: u64 = 2;
const STDIN: u64 = 3;
const OUTPUTS: [u64; 2] = [4, 5];
const FORWARDED: [u64; 2] = [6, 7];
const KIND_BITS: u32 = 3;

/// Whom a new connection wants: ids of [`LISTENER`].
const RPC: u32 = 0;
const FORWARD: u32 = 1;

/// Where connections come in. They must not block.
#[derive(Debug)]
pub struct Listeners {
    /// RPC.
    pub rpc: OwnedFd,
    /// Streams to ports of the guest.
    pub forward: OwnedFd,
}

/// See the module's description.
pub struct Server {
    epoll: OwnedFd,
    listeners: Listeners,
    reaper: Reaper,
    environment: Environment,
    forkpoint: Option<Forkpoint>,
    connections: BTreeMap<u32, Connection>,
    calls: BTreeMap<u32, Call>,
    forwards: BTreeMap<u32, Forward>,
    by_pid: BTreeMap<RawPid, u32>,
    next_id: u32,
    scratch: Box<[u8]>,
    events: Vec<Event>,
}

impl Server {
    /// Serves connections accepted on `listeners`. Without a `forkpoint`, freezing is refused.
    pub fn new(
        listeners: Listeners,
        reaper: Reaper,
        environment: Environment,
        forkpoint: Option<Forkpoint>,
    ) -> Result<Self, Error> {
        let failed = |errno: Errno| Error::System("watch its descriptors", errno.into());
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(failed)?;
        epoll::add(&epoll, &listeners.rpc, token(RPC, LISTENER), EventFlags::IN).map_err(failed)?;
        epoll::add(&epoll, &listeners.forward, token(FORWARD, LISTENER), EventFlags::IN).map_err(failed)?;
        epoll::add(&epoll, reaper.fd(), token(0, CHILDREN), EventFlags::IN).map_err(failed)?;
        Ok(Self {
            epoll,
            listeners,
            reaper,
            environment,
            forkpoint,
            connections: BTreeMap::new(),
            calls: BTreeMap::new(),
            forwards: BTreeMap::new(),
            by_pid: BTreeMap::new(),
            next_id: 1,
            scratch: vec![0; CHUNK].into_boxed_slice(),
            events: Vec::with_capacity(64),
        })
    }

    /// Stops at the forkpoint; returns in a fork.
    ///
    /// # Panics
    /// Without a forkpoint.
    pub fn pass_forkpoint(&mut self) -> Result<(), Error> {
        let forkpoint = self.forkpoint.as_mut().expect("only guests get here");
        let prepared = forkpoint.prepare()?;
        forkpoint.pass(prepared, &mut self.reaper, &mut self.environment);
        Ok(())
    }

    /// Serves until something the server cannot do without fails.
    pub fn run(&mut self) -> Result<Infallible, Error> {
        loop {
            let timeout = self.until_next_deadline();
            let mut events = std::mem::take(&mut self.events);
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::System("wait for events", errno.into())),
            }
            for event in &events {
                self.dispatch(event.data.u64(), event.flags)?;
            }
            self.events = events;
            self.finish_children()?;
            self.expire_calls();
        }
    }

    /// Ids are never used twice, so an event for something that is gone finds nothing.
    fn dispatch(&mut self, token: u64, flags: EventFlags) -> Result<(), Error> {
        let id = (token >> KIND_BITS) as u32;
        match token & ((1 << KIND_BITS) - 1) {
            LISTENER => self.accept(id)?,
            CHILDREN => self.reaper.reap(),
            CONNECTION => self.on_connection(id, flags)?,
            STDIN => self.on_stdin(id)?,
            kind => match OUTPUTS.iter().position(|output| *output == kind) {
                Some(index) => self.on_output(id, index),
                None => self.on_forwarded(id),
            },
        }
        Ok(())
    }

    fn accept(&mut self, wanted: u32) -> Result<(), Error> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let listener = if wanted == RPC { &self.listeners.rpc } else { &self.listeners.forward };
        let stream = match rustix::net::accept_with(listener, flags) {
            Ok(stream) => stream,
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED | Errno::CONNRESET) => return Ok(()),
            Err(Errno::NOMEM | Errno::NOBUFS | Errno::MFILE | Errno::NFILE) => {
                // The workload may have used it all up; the connection waits, and this loop must not spin.
                std::thread::sleep(Duration::from_millis(1));
                return Ok(());
            }
            Err(errno) => return Err(Error::System("accept a connection", errno.into())),
        };
        if wanted == FORWARD {
            self.forward(stream);
        } else if self.connections.len() < MAX_CONNECTIONS {
            self.add_connection(stream);
        }
        Ok(())
    }

    /// Serves RPC on a non-blocking stream.
    pub fn add_connection(&mut self, stream: OwnedFd) {
        let id = self.new_id();
        let mut connection = Connection::new(stream);
        connection.interest = connection.wanted();
        // One that cannot be watched is closed; the host sees it and tries again.
        let (data, interest) = (token(id, CONNECTION), connection.interest);
        if epoll::add(&self.epoll, connection.fd(), data, interest).is_ok() {
            self.connections.insert(id, connection);
        }
    }

    fn on_connection(&mut self, id: u32, flags: EventFlags) -> Result<(), Error> {
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(()) };
        let lost = flags.intersects(EventFlags::ERR | EventFlags::HUP)
            || (connection.stalled && flags.contains(EventFlags::RDHUP));
        let readable = !connection.stalled && flags.intersects(EventFlags::IN | EventFlags::RDHUP);
        if lost || (readable && !matches!(connection.fill(), Ok(Fill::Some | Fill::Nothing))) {
            self.drop_connection(id);
            return Ok(());
        }
        self.process(id)?;
        self.settle(id);
        Ok(())
    }

    /// Handles the frames that were read, until there are no more or the connection stalls.
    fn process(&mut self, id: u32) -> Result<(), Error> {
        while let Some(connection) = self.connections.get_mut(&id).filter(|connection| !connection.stalled) {
            match connection.next_frame() {
                Ok(Some((header, payload))) => self.handle(id, header, payload)?,
                Ok(None) => break,
                // Where the next frame starts is not known any more.
                Err(_) => self.drop_connection(id),
            }
        }
        Ok(())
    }

    fn on_stdin(&mut self, call_id: u32) -> Result<(), Error> {
        let Some(call) = self.calls.get_mut(&call_id) else { return Ok(()) };
        call.pump_input();
        if let Some(stdin) = call.stdin.as_ref().filter(|_| !call.has_input()) {
            let _ = epoll::delete(&self.epoll, stdin);
        }
        let connection = call.connection;
        self.resume(connection)
    }

    /// Reads a stalled connection again once none of its commands is stuffed.
    fn resume(&mut self, id: u32) -> Result<(), Error> {
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(()) };
        if connection.stalled {
            let mut calls = connection.calls.values().filter_map(|call| self.calls.get(call));
            connection.stalled = calls.any(Call::is_stuffed);
            self.process(id)?;
        }
        self.settle(id);
        Ok(())
    }

    fn on_output(&mut self, call_id: u32, index: usize) {
        let Some(call) = self.calls.get_mut(&call_id) else { return };
        let id = call.connection;
        let Some(kind) =
            call.outputs[index].as_ref().filter(|output| output.watched).map(|output| output.kind)
        else {
            return;
        };
        let count = call.read_output(index, &mut self.scratch);
        if let Some(connection) = self.connections.get_mut(&id).filter(|_| count > 0) {
            connection.send(call.number, kind, &self.scratch[..count]);
        }
        self.finish(call_id);
        self.settle(id);
    }

    /// Passes on how commands ended; not only after a signal, as on-fork hooks collect the dead too.
    fn finish_children(&mut self) -> Result<(), Error> {
        while let Some((pid, status)) = self.reaper.next_exit() {
            let Some(call_id) = self.by_pid.remove(&pid.as_raw_pid()) else { continue };
            let Some(call) = self.calls.get_mut(&call_id) else { continue };
            call.ended(status);
            let id = call.connection;
            self.finish(call_id);
            // An ended command takes no input, so its connection may go on.
            self.resume(id)?;
        }
        Ok(())
    }

    /// Sends how a command ended, if it has and all its output was read.
    fn finish(&mut self, call_id: u32) {
        let Some((call, exit)) = self.calls.get(&call_id).and_then(|call| Some((call, call.finished()?)))
        else {
            return;
        };
        if let Some(connection) = self.connections.get_mut(&call.connection) {
            let encoded = postcard::to_allocvec(&exit).expect("an exit can be encoded");
            connection.send(call.number, Kind::Exit, &encoded);
        }
        self.remove_call(call_id);
    }

    fn remove_call(&mut self, call_id: u32) {
        let Some(call) = self.calls.remove(&call_id) else { return };
        // The process may live on and its id be reused only after the reaper has seen it.
        if self.by_pid.remove(&call.pid.as_raw_pid()).is_some() {
            self.reaper.forget(call.pid);
        }
        if let Some(connection) = self.connections.get_mut(&call.connection) {
            connection.calls.remove(&call.number);
        }
    }

    fn drop_connection(&mut self, id: u32) {
        let Some(connection) = self.connections.remove(&id) else { return };
        for call_id in connection.calls.into_values() {
            if let Some(call) = self.calls.get(&call_id) {
                call.kill();
            }
            self.remove_call(call_id);
        }
    }

    /// Sends what is queued and brings what epoll watches in line with the state of the connection.
    fn settle(&mut self, id: u32) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.flush().is_err() {
            return self.drop_connection(id);
        }
        let wanted = connection.wanted();
        if wanted != connection.interest {
            connection.interest = wanted;
            if epoll::modify(&self.epoll, connection.fd(), token(id, CONNECTION), wanted).is_err() {
                return self.drop_connection(id);
            }
        }
        if connection.paused != connection.is_congested() {
            connection.paused = !connection.paused;
            for call_id in connection.calls.values() {
                if let Some(call) = self.calls.get_mut(call_id) {
                    watch_outputs(&self.epoll, *call_id, call, !connection.paused);
                }
            }
        }
    }

    fn until_next_deadline(&self) -> Option<Timespec> {
        let next = self.calls.values().filter_map(Call::deadline).min()?;
        let left = next.saturating_duration_since(Instant::now());
        Some(Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) })
    }

    fn expire_calls(&mut self) {
        if self.calls.values().all(|call| call.deadline().is_none()) {
            return;
        }
        let now = Instant::now();
        let is_due = |call: &Call| call.deadline().is_some_and(|deadline| deadline <= now);
        let due: Vec<u32> = self.calls.iter().filter(|(_, call)| is_due(call)).map(|(id, _)| *id).collect();
        for call_id in due {
            let Some(call) = self.calls.get_mut(&call_id) else { continue };
            call.expire();
            let id = call.connection;
            self.finish(call_id);
            self.settle(id);
        }
    }

    fn new_id(&mut self) -> u32 {
        self.next_id += 1;
        self.next_id
    }
}

/// Lets epoll watch the open outputs of a call, or not. A closed pipe always reports an event, so one that must wait
/// is taken out of the set.
fn watch_outputs(epoll: &OwnedFd, call_id: u32, call: &mut Call, on: bool) {
    for (slot, kind) in call.outputs.iter_mut().zip(OUTPUTS) {
        let Some(output) = slot.as_mut().filter(|output| output.watched != on) else { continue };
        let done = if on {
            epoll::add(epoll, output.pipe.as_fd(), token(call_id, kind), EventFlags::IN)
        } else {
            epoll::delete(epoll, output.pipe.as_fd())
        };
        match done {
            Ok(()) => output.watched = on,
            // An output nobody can watch would keep the call from ending.
            Err(_) => *slot = None,
        }
    }
}

fn token(id: u32, kind: u64) -> EventData {
    EventData::new_u64(u64::from(id) << KIND_BITS | kind)
}
