//! The process: its epoll, its queue of work, its timers, and what `forkd` tells it.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, VecDeque},
    io,
    net::Ipv4Addr,
    os::fd::{AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use forkling_vmm::channel::Channel;
use mio::{Events, Interest, Poll, Token, unix::SourceFd};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{
    Error,
    control::{FromNet, MAX_PACKET, Settings, ToNet},
    dns::{ReplyTo, resolver::Resolver},
    flow::{Flow, Kind, Next},
    host::HostAddresses,
    link::{Bound, Link, Received},
    policy::{self, Verdict, World},
    table::{self, Key, Table},
    tcp::Turn,
    udp,
};

/// Packets taken of a link before the next has its turn.
const TURN: usize = 64;

/// Events taken from the kernel at a time.
const EVENTS: usize = 256;

/// No link, flow or question has it: their kinds are others.
const CONTROL: Token = Token(0);

/// What may have something to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Work {
    /// A link: packets to read or to send.
    Link(Key),
    /// A flow.
    Flow(Key),
    /// A question to a resolver.
    Query(Key),
}

/// The state of the process.
pub struct Net {
    pub(crate) poll: Poll,
    pub(crate) settings: Settings,
    pub(crate) links: Table<Link>,
    pub(crate) ids: HashMap<u64, Key>,
    pub(crate) by_address: HashMap<Ipv4Addr, Key>,
    pub(crate) groups: HashMap<String, Vec<Key>>,
    pub(crate) flows: Table<Flow>,
    pub(crate) resolver: Resolver,
    pub(crate) host: HostAddresses,
    queue: VecDeque<Work>,
    timers: BinaryHeap<Reverse<(Instant, Work)>>,
    /// For packets that come.
    buffer: Vec<u8>,
    /// For packets that are made.
    pub(crate) scratch: Vec<u8>,
    started: Instant,
    pub(crate) now: Instant,
}

/// Serves a control socket until it is closed.
///
/// # Errors
/// As those of [`crate::run`].
pub fn serve(control: OwnedFd) -> Result<(), Error> {
    let poll = Poll::new().map_err(Error::io("make an epoll descriptor"))?;
    let watched = control.as_raw_fd();
    poll.registry()
        .register(&mut SourceFd(&watched), CONTROL, Interest::READABLE)
        .map_err(Error::io("watch its control socket"))?;
    let channel = Channel::new(control);
    let Some((ToNet::Start(settings), _)) = channel.receive()? else { return Ok(()) };
    let mut net = Net::new(poll, settings)?;
    channel.send(&FromNet::Started, &[])?;
    net.serve(&channel)
}

impl Net {
    pub(crate) fn new(poll: Poll, settings: Settings) -> Result<Self, Error> {
        raise_descriptors();
        if let Err(error) = udp::ping_socket([127, 0, 0, 1].into()) {
            tracing::warn!(%error, "guests cannot ping: allow it by net.ipv4.ping_group_range");
        }
        let now = Instant::now();
        Ok(Self {
            poll,
            resolver: Resolver::new(settings.resolvers.clone()),
            settings,
            links: Table::default(),
            ids: HashMap::new(),
            by_address: HashMap::new(),
            groups: HashMap::new(),
            flows: Table::default(),
            host: HostAddresses::read(now)
                .map_err(Error::io("read the addresses of this host in /proc/net"))?,
            queue: VecDeque::new(),
            timers: BinaryHeap::new(),
            buffer: vec![0; MAX_PACKET],
            scratch: vec![0; MAX_PACKET],
            started: now,
            now,
        })
    }

    fn serve(&mut self, channel: &Channel) -> Result<(), Error> {
        let mut events = Events::with_capacity(EVENTS);
        // What was sent with the first message has raised no event of its own.
        if !self.hear(channel)? {
            return Ok(());
        }
        loop {
            match self.poll.poll(&mut events, self.timeout()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                polled => polled.map_err(Error::io("wait for events"))?,
            }
            self.now = Instant::now();
            for event in &events {
                if event.token() == CONTROL {
                    if !self.hear(channel)? {
                        return Ok(());
                    }
                } else {
                    self.on_event(event);
                }
            }
            self.turns();
        }
    }

    /// Gives everything that may have something to do its turn, once. Returns whether there is more to do.
    pub(crate) fn turns(&mut self) -> bool {
        self.fire_timers();
        for _ in 0..self.queue.len() {
            if let Some(work) = self.queue.pop_front() {
                self.work(work);
            }
        }
        !self.queue.is_empty()
    }

    /// How many timers run.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn timers(&self) -> usize {
        self.timers.len()
    }

    fn timeout(&self) -> Option<Duration> {
        if !self.queue.is_empty() {
            return Some(Duration::ZERO);
        }
        let Reverse((at, _)) = self.timers.peek()?;
        Some(at.saturating_duration_since(Instant::now()))
    }

    fn on_event(&mut self, event: &mio::event::Event) {
        let (kind, key) = Key::of(event.token());
        let readable = event.is_readable() || event.is_read_closed() || event.is_error();
        let writable = event.is_writable() || event.is_write_closed() || event.is_error();
        match kind {
            table::Kind::Control => {}
            table::Kind::Link => {
                let Some(link) = self.links.get_mut(key) else { return };
                link.readable |= readable;
                // A bound link is read to its end first.
                if link.bound.is_none() && event.is_read_closed() {
                    return self.detach(key);
                }
                self.enqueue(Work::Link(key));
            }
            table::Kind::Flow => {
                if let Some(flow) = self.flows.get_mut(key) {
                    match &mut flow.kind {
                        Kind::Tcp(tcp) => tcp.ready(readable, writable),
                        Kind::Udp(udp) => udp.ready(),
                    }
                    self.enqueue(Work::Flow(key));
                }
            }
            table::Kind::Query => self.enqueue(Work::Query(key)),
        }
    }

    /// Puts something into the queue of work, once.
    pub fn enqueue(&mut self, work: Work) {
        let queued = match work {
            Work::Link(key) => self.links.get_mut(key).map(|link| &mut link.queued),
            Work::Flow(key) => self.flows.get_mut(key).map(|flow| &mut flow.queued),
            Work::Query(_) => return self.queue.push_back(work),
        };
        if let Some(queued) = queued
            && !std::mem::replace(queued, true)
        {
            self.queue.push_back(work);
        }
    }

    /// Has something put into the queue then.
    pub fn wake_at(&mut self, at: Instant, work: Work) {
        self.timers.push(Reverse((at, work)));
    }

    fn fire_timers(&mut self) {
        while let Some(&Reverse((at, work))) = self.timers.peek()
            && at <= self.now
        {
            self.timers.pop();
            if let Work::Flow(key) = work {
                let Some(flow) = self.flows.get_mut(key) else { continue };
                // A timer set earlier has been there before.
                if flow.wake != Some(at) {
                    continue;
                }
                flow.wake = None;
            }
            self.enqueue(work);
        }
    }

    fn work(&mut self, work: Work) {
        match work {
            Work::Link(key) => {
                if let Some(link) = self.links.get_mut(key) {
                    link.queued = false;
                    self.link_turn(key);
                }
            }
            Work::Flow(key) => {
                if let Some(flow) = self.flows.get_mut(key) {
                    flow.queued = false;
                    self.flow_turn(key, None);
                }
            }
            Work::Query(key) => self.query_turn(key),
        }
    }

    fn link_turn(&mut self, key: Key) {
        let Some(link) = self.links.get_mut(key) else { return };
        if link.flush()
            && let Some(bound) = &mut link.bound
        {
            for flow in std::mem::take(&mut bound.blocked) {
                self.enqueue(Work::Flow(flow));
            }
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        self.read_packets(key, &mut buffer);
        self.buffer = buffer;
        if let Some(at) = self.links.get_mut(key).and_then(|link| link.rest(self.now)) {
            self.wake_at(at, Work::Link(key));
        }
    }

    fn read_packets(&mut self, key: Key, buffer: &mut [u8]) {
        for _ in 0..TURN {
            let Some(link) = self.links.get_mut(key) else { return };
            match link.receive(buffer, self.now) {
                Received::Packet(length) => self.on_packet(key, buffer, length),
                Received::Later(wait) => return self.wake_at(self.now + wait, Work::Link(key)),
                Received::Message => {}
                Received::Nothing => return,
                Received::Closed => return self.detach(key),
            }
        }
        self.enqueue(Work::Link(key));
    }

    /// Gives a flow its turn, with a packet of its guest if there is one.
    pub fn flow_turn(&mut self, key: Key, packet: Option<&[u8]>) {
        let Some(flow) = self.flows.get_mut(key) else { return };
        let Some(link) = self.links.get_mut(flow.link) else { return };
        let owner = flow.link;
        let uptime = self.now.saturating_duration_since(self.started);
        let mut turn = Turn { link, scratch: &mut self.scratch, now: self.now, uptime };
        let mut queries = Vec::new();
        let next = match &mut flow.kind {
            Kind::Udp(udp) => udp.turn(&flow.id, &mut turn),
            Kind::Tcp(tcp) if tcp.is_waiting() => return self.connect_turn(key, packet),
            Kind::Tcp(tcp) => {
                let next = tcp.turn(packet, &mut turn);
                if let Some(stream) = tcp.stream() {
                    queries.extend(std::iter::from_fn(|| stream.query()));
                }
                next
            }
        };
        self.after(key, next);
        for query in queries {
            self.ask(owner, &query, ReplyTo::Tcp(key));
        }
    }

    /// What a turn of a flow asks for.
    pub fn after(&mut self, key: Key, next: Next) {
        match next {
            Next::Wait => {}
            Next::Again => self.enqueue(Work::Flow(key)),
            Next::End => self.end_flow(key),
            Next::Room => {
                let Some(flow) = self.flows.get(key) else { return };
                if let Some(bound) = self.links.get_mut(flow.link).and_then(|link| link.bound.as_mut())
                    && !bound.blocked.contains(&key)
                {
                    bound.blocked.push(key);
                }
            }
            Next::WaitFor(wait) => {
                let at = self.now + wait;
                let Some(flow) = self.flows.get_mut(key) else { return };
                if flow.wake.is_none_or(|wake| at < wake) {
                    flow.wake = Some(at);
                    self.wake_at(at, Work::Flow(key));
                }
            }
        }
    }

    /// Ends a flow and tells both sides.
    pub fn abort_flow(&mut self, key: Key) {
        let Some(flow) = self.flows.get_mut(key) else { return };
        let Some(link) = self.links.get_mut(flow.link) else { return };
        let uptime = self.now.saturating_duration_since(self.started);
        let mut turn = Turn { link, scratch: &mut self.scratch, now: self.now, uptime };
        if let Kind::Tcp(tcp) = &mut flow.kind {
            tcp.abort(&mut turn);
        }
        self.end_flow(key);
    }

    /// Frees a flow. What its guest was to be told has been told.
    pub fn end_flow(&mut self, key: Key) {
        let Some(flow) = self.flows.remove(key) else { return };
        if let Some(bound) = self.links.get_mut(flow.link).and_then(|link| link.bound.as_mut())
            && bound.flows.get(&flow.id) == Some(&key)
        {
            bound.flows.remove(&flow.id);
        }
    }

    /// What a bound link has.
    pub fn bound_mut(&mut self, link: Key) -> Option<&mut Bound> {
        self.links.get_mut(link)?.bound.as_deref_mut()
    }

    /// Whether policy allows it.
    pub fn decide(&mut self, link: Key, target: policy::Target, name: Option<&str>) -> Verdict {
        let world = World { guests: self.settings.guests, own: self.host.at(self.now) };
        let Some(bound) = self.links.get(link).and_then(|link| link.bound.as_ref()) else {
            return Verdict::Denied;
        };
        match name {
            Some(name) => policy::decide(&bound.policy, world, target, std::iter::once(name)),
            None => policy::decide(&bound.policy, world, target, bound.names_of(target.address, self.now)),
        }
    }

    /// The time since the process began.
    pub fn uptime(&self) -> Duration {
        self.now.saturating_duration_since(self.started)
    }
}

/// As many descriptors as the process may have: each flow takes one.
fn raise_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
    {
        tracing::warn!(%error, "the number of open files cannot be raised");
    }
}
