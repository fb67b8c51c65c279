//! TCP connections: the guest's is terminated here, and joined to one of the host.

mod side;

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr},
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

use mio::net::TcpStream;
use smoltcp::{
    socket::tcp::{Socket, State},
    time::Instant as SmolInstant,
};
use socket2::SockRef;

use self::side::Side;
use crate::{dns::stream::Stream, flow::Next, link::Link};

/// Bytes moved each way in a turn.
const TURN: usize = 512 * 1024;

/// A connection.
#[derive(Debug)]
pub struct Tcp {
    peer: Peer,
    readable: bool,
    writable: bool,
    /// The peer will send no more, or failed.
    ended: bool,
    /// The peer was told that the guest sends no more.
    shut: bool,
    guest: Guest,
}

#[derive(Debug)]
enum Peer {
    Host(TcpStream),
    /// The resolver here.
    Names(Stream),
}

#[derive(Debug)]
enum Guest {
    /// The host connects; the guest's SYN waits.
    Waiting(Vec<u8>),
    Open(Box<Side>),
}

/// What a turn is taken with.
pub struct Turn<'a> {
    /// The link of the flow.
    pub link: &'a mut Link,
    /// Room to make packets in, at least [`crate::control::MAX_PACKET`] bytes.
    pub scratch: &'a mut [u8],
    /// The time.
    pub now: Instant,
    /// The time since the process began.
    pub uptime: Duration,
}

impl Turn<'_> {
    fn smol(&self) -> SmolInstant {
        SmolInstant::from_micros(i64::try_from(self.uptime.as_micros()).unwrap_or(i64::MAX))
    }
}

/// What became of a connection to the host.
#[derive(Debug)]
pub enum Connected {
    /// It is there.
    Yes,
    /// It is not known yet.
    NotYet,
    /// It failed; the guest's SYN, for the answer.
    Failed(io::Error, Vec<u8>),
}

impl Tcp {
    /// A connection to the host that was begun for a guest's SYN, an IP packet.
    pub fn connecting(stream: TcpStream, syn: Vec<u8>) -> Self {
        Self::new(Peer::Host(stream), Guest::Waiting(syn))
    }

    /// A connection to the resolver here.
    pub fn names(local: SocketAddr, busy: usize, turn: &Turn<'_>) -> Option<Self> {
        let side = Side::new(local, busy, turn)?;
        Some(Self::new(Peer::Names(Stream::default()), Guest::Open(Box::new(side))))
    }

    fn new(peer: Peer, guest: Guest) -> Self {
        Self { peer, readable: true, writable: true, ended: false, shut: false, guest }
    }

    /// The host's socket became ready.
    pub fn ready(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        self.writable |= writable;
    }

    /// The queries of a connection to the resolver.
    pub fn stream(&mut self) -> Option<&mut Stream> {
        match &mut self.peer {
            Peer::Names(stream) => Some(stream),
            Peer::Host(_) => None,
        }
    }

    /// Whether the guest's SYN still waits for the host.
    pub fn is_waiting(&self) -> bool {
        matches!(self.guest, Guest::Waiting(_))
    }

    /// Looks whether the host has connected. If so, [`Tcp::open`] is due.
    pub fn connect(&mut self) -> Connected {
        let (Peer::Host(stream), Guest::Waiting(syn)) = (&self.peer, &mut self.guest) else {
            return Connected::Yes;
        };
        let error = match stream.take_error() {
            Ok(None) => match stream.peer_addr() {
                Ok(_) => return Connected::Yes,
                Err(error) if error.kind() == io::ErrorKind::NotConnected => return Connected::NotYet,
                Err(error) => error,
            },
            Ok(Some(error)) | Err(error) => error,
        };
        Connected::Failed(error, std::mem::take(syn))
    }

    /// Makes the guest's side. Returns the SYN to begin with; `None` if it cannot be.
    pub fn open(&mut self, local: SocketAddr, busy: usize, turn: &Turn<'_>) -> Option<Vec<u8>> {
        let side = Side::new(local, busy, turn)?;
        match std::mem::replace(&mut self.guest, Guest::Open(Box::new(side))) {
            Guest::Waiting(syn) => Some(syn),
            Guest::Open(_) => None,
        }
    }

    /// The host's connection is not ended in order, but reset, when it is dropped.
    pub fn reset_host(&self) {
        if let Peer::Host(stream) = &self.peer {
            // If it fails, the connection just ends.
            let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
        }
    }

    /// Resets both sides.
    pub fn abort(&mut self, turn: &mut Turn<'_>) {
        self.reset_host();
        if let Guest::Open(side) = &mut self.guest {
            side.socket().abort();
            let _ = catch_unwind(AssertUnwindSafe(|| side.send(turn)));
        }
    }

    /// Takes a packet of the guest, if there is one, and moves what can be moved. The stack is fed by strangers: should
    /// it panic, that is the end of this connection and no other.
    pub fn turn(&mut self, packet: Option<&[u8]>, turn: &mut Turn<'_>) -> Next {
        catch_unwind(AssertUnwindSafe(|| self.turn_unguarded(packet, turn))).unwrap_or_else(|_| {
            tracing::error!("a connection is dropped: the TCP stack has failed on it");
            self.reset_host();
            Next::End
        })
    }

    fn turn_unguarded(&mut self, packet: Option<&[u8]>, turn: &mut Turn<'_>) -> Next {
        let Guest::Open(side) = &mut self.guest else { return Next::Wait };
        if let Some(packet) = packet {
            side.receive(packet, turn);
        }
        let socket = side.socket();
        let moved = match &mut self.peer {
            Peer::Host(stream) => {
                let mut host = Host {
                    stream,
                    readable: &mut self.readable,
                    writable: &mut self.writable,
                    ended: &mut self.ended,
                };
                host.move_bytes(socket)
            }
            Peer::Names(stream) => {
                stream.move_bytes(socket);
                0
            }
        };
        let heard =
            matches!(socket.state(), State::CloseWait | State::LastAck | State::Closing | State::TimeWait);
        if heard && !self.shut && socket.recv_queue() == 0 {
            match &mut self.peer {
                Peer::Host(stream) => {
                    self.shut = true;
                    // A socket that is gone already needs no telling.
                    let _ = stream.shutdown(Shutdown::Write);
                }
                Peer::Names(stream) if stream.is_idle() => {
                    self.shut = true;
                    socket.close();
                }
                Peer::Names(_) => {}
            }
        }
        let sent_all = side.send(turn);
        match side.socket().state() {
            State::TimeWait => return Next::End,
            State::Closed => {
                if !(self.ended && self.shut) {
                    self.reset_host();
                }
                return Next::End;
            }
            _ => {}
        }
        match (turn.link.has_room(turn.now), sent_all) {
            (Err(None), false) => Next::Room,
            (Err(Some(wait)), false) => Next::WaitFor(wait),
            (Ok(()), false) => Next::Again,
            _ if moved >= TURN => Next::Again,
            _ => side.next(turn),
        }
    }
}

/// The host's side of a turn.
struct Host<'a> {
    stream: &'a mut TcpStream,
    readable: &'a mut bool,
    writable: &'a mut bool,
    ended: &'a mut bool,
}

impl Host<'_> {
    /// Straight between the socket and the rings of the stack. Returns the bytes moved.
    fn move_bytes(&mut self, socket: &mut Socket<'_>) -> usize {
        let (mut up, mut down) = (0, 0);
        while *self.writable && up < TURN && socket.can_recv() {
            let written = socket.recv(|ring| settle(self.stream.write(ring)));
            match written.unwrap_or(Ok(0)) {
                Ok(bytes) => up += bytes,
                Err(error) => self.failed(&error, socket, true),
            }
        }
        while *self.readable && !*self.ended && down < TURN && socket.can_send() {
            let read = socket.send(|ring| settle(self.stream.read(ring)));
            match read {
                Ok(Ok(0)) => {
                    *self.ended = true;
                    socket.close();
                    // If it is gone altogether, the next write tells.
                    *self.writable = true;
                    return TURN;
                }
                Ok(Ok(bytes)) => down += bytes,
                Ok(Err(error)) => self.failed(&error, socket, false),
                Err(_) => break,
            }
        }
        up.max(down)
    }

    fn failed(&mut self, error: &io::Error, socket: &mut Socket<'_>, writing: bool) {
        match error.kind() {
            io::ErrorKind::WouldBlock if writing => *self.writable = false,
            io::ErrorKind::WouldBlock => *self.readable = false,
            io::ErrorKind::Interrupted => {}
            // What it sent before it closed is still to be read.
            io::ErrorKind::BrokenPipe if writing && !*self.ended => *self.writable = false,
            _ => {
                (*self.writable, *self.readable) = (false, false);
                socket.abort();
            }
        }
    }
}

fn settle(result: io::Result<usize>) -> (usize, io::Result<usize>) {
    (*result.as_ref().unwrap_or(&0), result)
}

/// The address of a guest's destination on this host.
pub fn host_address(remote: IpAddr, port: u16) -> SocketAddr {
    let address = if remote == forkling_proto::network::HOST { [127, 0, 0, 1].into() } else { remote };
    SocketAddr::new(address, port)
}
