//! One stream between a host socket and a guest socket.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};

use mio::{Interest, Registry, Token, unix::SourceFd};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::line::Rest;
use super::packet::{Header, Key, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use crate::protocol::{Opening, Passage};

/// Bytes from the guest a connection holds while its host socket takes none; the credit the guest gets.
pub const BUFFER: u32 = 256 * 1024;

/// The guest is told of freed buffer in steps of this many bytes, or with the next packet it gets anyway.
/// Well below [`BUFFER`]: a guest out of credit waits only while more than the difference is really buffered.
const CREDIT_STEP: u32 = BUFFER / 4;

/// An emptied buffer larger than this is given back to the host.
const KEEP_CAPACITY: usize = 16 * 1024;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// REQUEST is to be sent.
    New,
    /// REQUEST is sent, the guest has not answered.
    Requested,
    /// Data may flow.
    Open,
    /// The guest is done with it and only buffered data is left to be given to the host.
    Draining,
}

/// Control packets the guest is owed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Owed {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
    shutdown: bool,
}

/// The host socket cannot be used any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

/// What reading from the host gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// So many bytes.
    Data(usize),
    /// Nothing now.
    Nothing,
}

/// A stream whose fate somebody counts.
#[derive(Clone, Copy, Debug)]
struct Forward {
    group: u32,
    /// The guest's verdict was read, and it was good.
    accepted: bool,
}

/// What epoll said of a host socket.
#[derive(Clone, Copy, Debug, Default)]
pub struct Readiness {
    /// There is data or an end.
    pub readable: bool,
    /// There is room.
    pub writable: bool,
    /// Closed in both directions.
    pub hung_up: bool,
}

/// A connection. Its host socket is used without blocking, whatever its flags say.
#[derive(Debug)]
pub struct Connection {
    key: Key,
    stream: OwnedFd,
    phase: Phase,
    owed: Owed,
    interest: Option<Interest>,
    /// The host is to be told that the guest accepted.
    announce: bool,
    /// Bytes for the guest ahead of the host's.
    first: Vec<u8>,
    forward: Option<Forward>,
    /// The host socket may have data (true until a read finds none).
    readable: bool,
    /// The host sends no more.
    host_ended: bool,
    /// The host neither sends nor receives.
    host_hung_up: bool,
    /// SHUTDOWN flags the guest sent.
    guest_shutdown: u32,
    /// The host was told that the guest sends no more.
    host_told_end: bool,
    /// Bytes sent to the guest, modulo 2^32, and its last word on what it can take.
    sent: u32,
    peer_buffer: u32,
    peer_forwarded: u32,
    /// Bytes taken from the guest but not yet by the host.
    buffer: VecDeque<u8>,
    /// Bytes given to the host, modulo 2^32, and what the guest was last told of that.
    forwarded: u32,
    told_forwarded: u32,
}

impl Connection {
    /// A connection the host asks for.
    pub fn to_guest(key: Key, stream: OwnedFd, opening: Opening) -> Self {
        let owed = Owed { request: true, ..Owed::default() };
        let connection = Self { owed, ..Self::new(key, stream, Phase::New) };
        match opening {
            Opening::Plain => connection,
            Opening::Announced => Self { announce: true, ..connection },
            Opening::Forwarded { group, first } => {
                Self { first, forward: Some(Forward { group, accepted: false }), ..connection }
            }
        }
    }

    /// A connection the guest asked for with `request`, accepted.
    pub fn from_guest(key: Key, stream: OwnedFd, request: &Header) -> Self {
        let owed = Owed { response: true, ..Owed::default() };
        let mut connection = Self { owed, ..Self::new(key, stream, Phase::Open) };
        connection.take_credit(request);
        connection
    }

    /// A line that was at rest.
    pub fn on_line(rest: Rest, stream: OwnedFd) -> Self {
        Self { peer_buffer: rest.buffer, ..Self::new(rest.key, stream, Phase::Open) }
    }

    fn new(key: Key, stream: OwnedFd, phase: Phase) -> Self {
        Self {
            key,
            stream,
            phase,
            owed: Owed::default(),
            interest: None,
            announce: false,
            first: Vec::new(),
            forward: None,
            readable: true,
            host_ended: false,
            host_hung_up: false,
            guest_shutdown: 0,
            host_told_end: false,
            sent: 0,
            peer_buffer: 0,
            peer_forwarded: 0,
            buffer: VecDeque::new(),
            forwarded: 0,
            told_forwarded: 0,
        }
    }

    /// Its ports.
    pub fn key(&self) -> Key {
        self.key
    }

    /// Its group, if it is forwarded.
    pub fn group(&self) -> Option<u32> {
        self.forward.map(|forward| forward.group)
    }

    /// What its end is to those who count forwarded streams: their group, and what it was.
    pub fn passed(&self) -> Option<(u32, Passage)> {
        let passage = |forward: Forward| if forward.accepted { Passage::Ended } else { Passage::Refused };
        self.forward.map(|forward| (forward.group, passage(forward)))
    }

    /// How far it is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether the guest is owed a control packet.
    pub fn owes_control(&self) -> bool {
        self.owed != Owed::default()
    }

    /// Whether there may be data for the guest, and the guest wants and can take it.
    pub fn may_have_data(&self) -> bool {
        let wanted = self.guest_shutdown & SHUTDOWN_RECEIVE == 0;
        self.phase == Phase::Open && self.readable && !self.host_ended && wanted && self.credit() > 0
    }

    /// Whether bytes of the guest wait for the host.
    pub fn is_buffering(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// Bytes that may be sent to the guest now.
    pub fn credit(&self) -> usize {
        // A guest that lies about what it took only starves itself.
        self.peer_buffer.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded)) as usize
    }

    /// The most urgent control packet owed.
    pub fn next_control(&mut self) -> Option<Header> {
        let (op, flags) = match &mut self.owed {
            Owed { request: owed @ true, .. } => {
                *owed = false;
                self.phase = Phase::Requested;
                (op::REQUEST, 0)
            }
            Owed { response: owed @ true, .. } => {
                *owed = false;
                (op::RESPONSE, 0)
            }
            Owed { credit_update: true, .. } => (op::CREDIT_UPDATE, 0),
            Owed { credit_request: owed @ true, .. } => {
                *owed = false;
                (op::CREDIT_REQUEST, 0)
            }
            Owed { shutdown: owed @ true, .. } => {
                *owed = false;
                let receive = if self.host_hung_up { SHUTDOWN_RECEIVE } else { 0 };
                (op::SHUTDOWN, SHUTDOWN_SEND | receive)
            }
            _ => return None,
        };
        Some(Header { flags, ..self.header(op, 0) })
    }

    /// A header with the current credit, which thereby is told.
    fn header(&mut self, op: u16, len: u32) -> Header {
        self.owed.credit_update = false;
        self.told_forwarded = self.forwarded;
        Header { len, buf_alloc: BUFFER, fwd_cnt: self.forwarded, ..self.key.header(op) }
    }

    /// Reads from the host into `data`, which is not empty and not longer than the credit.
    pub fn receive(&mut self, data: &mut [u8]) -> Result<Received, Gone> {
        if !self.first.is_empty() {
            let len = self.first.len().min(data.len());
            data[..len].copy_from_slice(&self.first[..len]);
            self.first.drain(..len);
            return Ok(Received::Data(len));
        }
        match retry(|| recv(&self.stream, &mut *data, RecvFlags::DONTWAIT)) {
            Ok((0, _)) => {
                self.host_ended = true;
                self.owed.shutdown = true;
                Ok(Received::Nothing)
            }
            Ok((len, _)) => Ok(Received::Data(len)),
            Err(Errno::AGAIN) => {
                self.readable = false;
                Ok(Received::Nothing)
            }
            Err(_) => Err(Gone),
        }
    }

    /// The header of a data packet of `len` bytes, which thereby are sent.
    pub fn data_header(&mut self, len: usize) -> Header {
        let len = u32::try_from(len).expect("a packet is no longer than the credit, a u32");
        self.sent = self.sent.wrapping_add(len);
        // The answer, or an update by itself, gives the connection its next turn.
        self.owed.credit_request |= self.credit() == 0;
        self.header(op::RW, len)
    }

    /// Notes the guest's word on its receive buffer, which every packet has.
    pub fn take_credit(&mut self, header: &Header) {
        self.peer_buffer = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
    }

    /// The guest accepted the connection. Errors: the host cannot be told.
    pub fn open(&mut self) -> Result<(), Gone> {
        self.phase = Phase::Open;
        if !self.announce {
            return Ok(());
        }
        let line = format!("OK {}\n", self.key.host_port);
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        // Nothing was sent on the stream before, so a socket that does not take the line whole is of no use.
        match retry(|| send(&self.stream, line.as_bytes(), flags)) {
            Ok(len) if len == line.len() => Ok(()),
            _ => Err(Gone),
        }
    }

    /// Whether the guest's next byte is its verdict.
    pub fn awaits_verdict(&self) -> bool {
        self.forward.is_some_and(|forward| !forward.accepted)
    }

    /// The guest's first byte. Returns the group if it is good. Errors: it is not.
    pub fn take_verdict(&mut self, verdict: u8) -> Result<Option<u32>, Gone> {
        if verdict != 0 {
            return Err(Gone);
        }
        self.count_forwarded(1);
        let Some(forward) = &mut self.forward else { return Ok(None) };
        forward.accepted = true;
        Ok(Some(forward.group))
    }

    /// The guest asks how much it may send.
    pub fn owe_credit_update(&mut self) {
        self.owed.credit_update = true;
    }

    /// Room for data of the guest in bytes.
    pub fn room(&self) -> usize {
        BUFFER as usize - self.buffer.len()
    }

    /// Gives the guest's bytes to the host, at once as far as it takes them. The caller has checked [`Self::room`].
    pub fn forward(&mut self, mut data: &[u8]) -> Result<(), Gone> {
        if self.buffer.is_empty() {
            let taken = self.send(data)?;
            data = &data[taken..];
        }
        self.buffer.extend(data);
        Ok(())
    }

    /// Gives buffered bytes to the host, then what the guest said about its end.
    pub fn flush(&mut self) -> Result<(), Gone> {
        while !self.buffer.is_empty() {
            let taken = retry(|| {
                send(&self.stream, self.buffer.as_slices().0, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
            });
            match taken {
                Ok(taken) => {
                    self.buffer.drain(..taken);
                    self.count_forwarded(taken);
                }
                Err(Errno::AGAIN) => return Ok(()),
                Err(_) => return Err(Gone),
            }
        }
        if self.buffer.capacity() > KEEP_CAPACITY {
            self.buffer = VecDeque::new();
        }
        if self.guest_shutdown & SHUTDOWN_SEND != 0 && !self.host_told_end {
            self.host_told_end = true;
            // The host may have closed already, which is no news here.
            let _ = shutdown(&self.stream, Shutdown::Write);
        }
        Ok(())
    }

    /// Sends what the host takes at once.
    fn send(&mut self, data: &[u8]) -> Result<usize, Gone> {
        let mut taken = 0;
        while taken < data.len() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match retry(|| send(&self.stream, &data[taken..], flags)) {
                Ok(len) => taken += len,
                Err(Errno::AGAIN) => break,
                Err(_) => return Err(Gone),
            }
        }
        self.count_forwarded(taken);
        Ok(taken)
    }

    fn count_forwarded(&mut self, len: usize) {
        // At most BUFFER at a time, so the counter wraps but nothing is cut off.
        self.forwarded = self.forwarded.wrapping_add(len as u32);
        if self.forwarded.wrapping_sub(self.told_forwarded) >= CREDIT_STEP {
            self.owed.credit_update = true;
        }
    }

    /// The guest ends directions by SHUTDOWN `flags`. True: it has now ended both.
    pub fn guest_shuts_down(&mut self, flags: u32) -> Result<bool, Gone> {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        self.flush()?;
        Ok(self.guest_shutdown == SHUTDOWN_BOTH)
    }

    /// The guest needs to hear nothing more; what is buffered goes to the host.
    pub fn drain(&mut self) {
        self.phase = Phase::Draining;
        self.owed = Owed::default();
    }

    /// epoll's news of the host socket.
    pub fn on_ready(&mut self, ready: Readiness) -> Result<(), Gone> {
        self.readable |= ready.readable;
        if ready.hung_up && !self.host_hung_up {
            self.host_hung_up = true;
            // Otherwise the end comes with the last byte of data.
            self.owed.shutdown |= self.host_ended;
        }
        if ready.writable || ready.hung_up { self.flush() } else { Ok(()) }
    }

    /// Has epoll watch the host socket, for room too if there is something to send. One system call, and only if
    /// what is to be watched changed.
    pub fn watch(&mut self, registry: &Registry, token: Token) -> std::io::Result<()> {
        let wanted = match self.interest {
            Some(interest) if interest.is_writable() => return Ok(()),
            Some(_) if self.buffer.is_empty() => return Ok(()),
            _ if self.buffer.is_empty() => Interest::READABLE,
            _ => Interest::READABLE | Interest::WRITABLE,
        };
        let fd = self.stream.as_raw_fd();
        match self.interest.replace(wanted) {
            None => registry.register(&mut SourceFd(&fd), token, wanted),
            Some(_) => registry.reregister(&mut SourceFd(&fd), token, wanted),
        }
    }

    /// Ends the watch. Closing the socket would not: whoever sent it may hold it open.
    pub fn unwatch(&mut self, registry: &Registry) {
        if self.interest.take().is_some() {
            // Only fails if it was not watched.
            let _ = registry.deregister(&mut SourceFd(&self.stream.as_raw_fd()));
        }
    }
}

/// Repeats a system call that a signal interrupted.
fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}
