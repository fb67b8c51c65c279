//! Questions to the resolvers of the host, and the answers they gave.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::{SocketAddr, UdpSocket as StdUdp},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use mio::{Interest, Registry, net::TcpStream, unix::SourceFd};

use super::{
    Waiter,
    message::{self, Answer, Code, Heard, Question},
};
use crate::{
    table::{Key, Kind, Table},
    udp::any,
};

/// How long a resolver may take, and how often all are asked.
const PATIENCE: Duration = Duration::from_secs(2);
const ROUNDS: usize = 2;

/// Answers kept, and questions asked at a time, of all links.
const CACHED: usize = 10_000;
const ASKED: usize = 4096;

/// Those who may wait for one answer.
const WAITERS: usize = 1024;

/// How long answers are kept: those without records, and at most.
const NEGATIVE: Duration = Duration::from_secs(5);
const LONGEST: Duration = Duration::from_hours(24);

/// The resolver.
#[derive(Debug, Default)]
pub struct Resolver {
    /// Those that are asked.
    servers: Vec<SocketAddr>,
    cache: HashMap<Question, Cached>,
    asked: HashMap<Question, Key>,
    queries: Table<Upstream>,
}

/// An answer and its age.
#[derive(Clone, Debug)]
pub struct Cached {
    /// The answer.
    pub answer: Answer,
    /// When it was given.
    pub since: Instant,
    until: Instant,
    /// It was made here; its addresses need not be looked at.
    pub here: bool,
}

impl Cached {
    /// An answer that was made here.
    pub fn now(answer: Answer, now: Instant) -> Self {
        Self { answer, since: now, until: now, here: true }
    }
}

#[derive(Debug)]
struct Upstream {
    question: Question,
    id: u16,
    attempt: usize,
    socket: Socket,
    deadline: Instant,
    waiters: Vec<Waiter>,
}

#[derive(Debug)]
enum Socket {
    None,
    Udp(StdUdp),
    Tcp { stream: TcpStream, outgoing: Vec<u8>, incoming: Vec<u8> },
}

/// What became of a question.
#[derive(Debug)]
pub enum Progress {
    /// It is being asked; it is to be looked at again then.
    Asked(Key, Instant),
    /// It is answered, for these.
    Answered(Cached, Vec<Waiter>),
    /// Nothing is to be done for it now.
    Gone,
}

impl Resolver {
    /// Asks these servers, in turn.
    pub fn new(servers: Vec<SocketAddr>) -> Self {
        Self { servers, ..Self::default() }
    }

    /// An answer that still holds.
    pub fn cached(&self, question: &Question, now: Instant) -> Option<Cached> {
        self.cache.get(question).filter(|cached| cached.until > now).cloned()
    }

    /// Asks, or joins those who wait for the same. `None`: too much is asked already.
    pub fn ask(
        &mut self,
        question: &Question,
        waiter: Waiter,
        registry: &Registry,
        now: Instant,
    ) -> Option<Progress> {
        if let Some(key) = self.asked.get(question).copied()
            && let Some(query) = self.queries.get_mut(key)
        {
            if query.waiters.len() >= WAITERS {
                return None;
            }
            query.waiters.push(waiter);
            return Some(Progress::Gone);
        }
        if self.queries.len() >= ASKED {
            return None;
        }
        let query = Upstream {
            question: question.clone(),
            id: 0,
            attempt: 0,
            socket: Socket::None,
            deadline: now,
            waiters: vec![waiter],
        };
        let key = self.queries.insert(query);
        self.asked.insert(question.clone(), key);
        Some(self.attempt(key, registry, now))
    }

    /// Asks the next server that can be asked.
    fn attempt(&mut self, key: Key, registry: &Registry, now: Instant) -> Progress {
        let Some(query) = self.queries.get_mut(key) else { return Progress::Gone };
        while query.attempt < ROUNDS * self.servers.len() {
            let server = self.servers[query.attempt % self.servers.len()];
            query.attempt += 1;
            match query.begin(server, key, registry) {
                Ok(()) => {
                    query.deadline = now + PATIENCE;
                    return Progress::Asked(key, query.deadline);
                }
                Err(error) => tracing::debug!(%server, %error, "a resolver cannot be asked"),
            }
        }
        self.finish(key, Answer::empty(Code::ServerFailure), now)
    }

    fn finish(&mut self, key: Key, answer: Answer, now: Instant) -> Progress {
        let Some(query) = self.queries.remove(key) else { return Progress::Gone };
        self.asked.remove(&query.question);
        let age = match answer.ttl() {
            Some(ttl) => Duration::from_secs(ttl.into()).min(LONGEST),
            None => NEGATIVE,
        };
        let cached = Cached { answer, since: now, until: now + age, here: false };
        if cached.answer.code != Code::ServerFailure {
            self.keep(query.question.clone(), cached.clone(), now);
        }
        Progress::Answered(cached, query.waiters)
    }

    fn keep(&mut self, question: Question, cached: Cached, now: Instant) {
        if self.cache.len() >= CACHED {
            self.cache.retain(|_, cached| cached.until > now);
        }
        if self.cache.len() >= CACHED {
            // Emptied at once, so that a flood of names does not cost a search for each.
            self.cache.clear();
        }
        self.cache.insert(question, cached);
    }

    /// A socket is ready, or a deadline has come.
    pub fn turn(&mut self, key: Key, registry: &Registry, now: Instant) -> Progress {
        let Some(query) = self.queries.get_mut(key) else { return Progress::Gone };
        match query.hear() {
            Ok(Heard::Answer(answer)) => self.finish(key, answer, now),
            Ok(Heard::Truncated) => {
                let servers = self.servers.len().max(1);
                let server = self.servers.get((query.attempt + servers - 1) % servers).copied();
                let deadline = now + PATIENCE;
                match server.map(|server| query.begin_tcp(server, key, registry)) {
                    Some(Ok(())) => {
                        query.deadline = deadline;
                        Progress::Asked(key, deadline)
                    }
                    _ => self.attempt(key, registry, now),
                }
            }
            Ok(Heard::Nothing) if now < query.deadline => Progress::Gone,
            Ok(Heard::Nothing | Heard::Failed) | Err(_) => self.attempt(key, registry, now),
        }
    }
}

impl Upstream {
    /// By UDP, with a new number from a new port.
    fn begin(&mut self, server: SocketAddr, key: Key, registry: &Registry) -> io::Result<()> {
        self.socket = Socket::None;
        let mut id = [0; 2];
        rustix::rand::getrandom(&mut id[..], rustix::rand::GetRandomFlags::empty())?;
        self.id = u16::from_ne_bytes(id);
        let socket = StdUdp::bind(any(server))?;
        socket.set_nonblocking(true)?;
        socket.connect(server)?;
        registry.register(&mut SourceFd(&socket.as_raw_fd()), key.token(Kind::Query), Interest::READABLE)?;
        socket.send(&self.encoded()?)?;
        self.socket = Socket::Udp(socket);
        Ok(())
    }

    fn begin_tcp(&mut self, server: SocketAddr, key: Key, registry: &Registry) -> io::Result<()> {
        let message = self.encoded()?;
        let mut stream = TcpStream::connect(server)?;
        registry.register(&mut stream, key.token(Kind::Query), Interest::READABLE | Interest::WRITABLE)?;
        let mut outgoing = (message.len() as u16).to_be_bytes().to_vec();
        outgoing.extend_from_slice(&message);
        self.socket = Socket::Tcp { stream, outgoing, incoming: Vec::new() };
        Ok(())
    }

    fn encoded(&self) -> io::Result<Vec<u8>> {
        message::question(self.id, &self.question).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    fn hear(&mut self) -> io::Result<Heard> {
        let mut buffer = [0; 4096];
        match &mut self.socket {
            Socket::None => Ok(Heard::Failed),
            Socket::Udp(socket) => loop {
                let length = match socket.recv(&mut buffer) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Heard::Nothing),
                    length => length?,
                };
                match message::heard(&buffer[..length], self.id, &self.question) {
                    // Perhaps a forgery: the true one may be behind it.
                    Heard::Nothing => {}
                    heard => return Ok(heard),
                }
            },
            Socket::Tcp { stream, outgoing, incoming } => {
                while !outgoing.is_empty() {
                    match stream.write(outgoing) {
                        Ok(sent) => drop(outgoing.drain(..sent)),
                        Err(error)
                            if matches!(
                                error.kind(),
                                io::ErrorKind::WouldBlock | io::ErrorKind::NotConnected
                            ) =>
                        {
                            return Ok(Heard::Nothing);
                        }
                        Err(error) => return Err(error),
                    }
                }
                loop {
                    if let Some((length, message)) = incoming.split_first_chunk::<2>()
                        && let Some(message) = message.get(..usize::from(u16::from_be_bytes(*length)))
                    {
                        return Ok(match message::heard(message, self.id, &self.question) {
                            Heard::Answer(answer) => Heard::Answer(answer),
                            _ => Heard::Failed,
                        });
                    }
                    match stream.read(&mut buffer) {
                        Ok(0) => return Ok(Heard::Failed),
                        Ok(length) => incoming.extend_from_slice(&buffer[..length]),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Heard::Nothing),
                        Err(error) => return Err(error),
                    }
                }
            }
        }
    }
}
