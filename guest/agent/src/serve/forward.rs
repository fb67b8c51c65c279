//! Streams of the host to TCP ports of the guest's loopback ([`forkling_proto::forward`]).

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};

use forkling_proto::forward::{self, HEADER_LEN, Verdict};
use rustix::event::epoll::{self, EventFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::splice::Splice;
use super::{FORWARDED, Server, token};

/// Most streams at a time; further ones are closed at once. Each has two descriptors of the 1024 an init may open.
const MAX_FORWARDS: usize = 256;

/// The side of the host, and the side of the guest's server.
const HOST: usize = 0;
const GUEST: usize = 1;

/// How far a stream is.
#[derive(Debug)]
enum Stage {
    /// Its header is being read.
    Header { read: Vec<u8> },
    /// The connection to the guest's server is under way; whether the other address family is left to be tried.
    Connecting { socket: OwnedFd, port: u16, last: bool },
    /// Joined.
    Open(Splice),
}

/// Why a stream ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It was carried to its end, or one of its sides is gone.
    Over,
    /// The host is to be told first.
    Refused(Verdict),
}

/// One forwarded stream.
#[derive(Debug)]
pub struct Forward {
    host: OwnedFd,
    stage: Stage,
    /// Events last asked of epoll for either side; none: not watched, since epoll reports an end unasked, again and again.
    interest: [EventFlags; 2],
}

impl Server {
    /// Takes a new stream of the host.
    pub(super) fn forward(&mut self, host: OwnedFd) {
        if self.forwards.len() >= MAX_FORWARDS {
            return tell(&host, Verdict::Failed);
        }
        let stage = Stage::Header { read: Vec::new() };
        let forward = Forward { host, stage, interest: [EventFlags::empty(); 2] };
        let id = self.new_id();
        self.forwards.insert(id, forward);
        // The header is usually there already.
        self.on_forwarded(id);
    }

    /// Goes on with a stream as far as is possible now.
    pub(super) fn on_forwarded(&mut self, id: u32) {
        let Some(forward) = self.forwards.get_mut(&id) else { return };
        let advanced = forward.advance(&mut self.scratch).and_then(|()| {
            let watched = forward.watch(&self.epoll, id);
            watched.map_err(|_| End::Over)
        });
        if let Err(end) = advanced {
            if let End::Refused(verdict) = end {
                tell(&forward.host, verdict);
            }
            self.forwards.remove(&id);
        }
    }
}

impl Forward {
    fn advance(&mut self, scratch: &mut [u8]) -> Result<(), End> {
        loop {
            match &mut self.stage {
                Stage::Header { read } => {
                    let mut rest = [0; HEADER_LEN];
                    let rest = &mut rest[..HEADER_LEN - read.len()];
                    match rustix::io::read(&self.host, &mut *rest) {
                        Ok(0) => return Err(End::Over),
                        Ok(count) => read.extend_from_slice(&rest[..count]),
                        Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
                        Err(_) => return Err(End::Over),
                    }
                    if let Ok(header) = <[u8; HEADER_LEN]>::try_from(read.as_slice()) {
                        self.stage = connect(forward::port(header), false)?;
                        return Ok(());
                    }
                }
                Stage::Connecting { socket, port, last } => match sockopt::socket_error(&*socket) {
                    Ok(Ok(())) if rustix::net::getpeername(&*socket).is_err() => return Ok(()),
                    Ok(Ok(())) => self.join(),
                    Ok(Err(errno)) => {
                        self.stage = refused(errno, *port, *last)?;
                        // The socket that failed is closed, and epoll has forgotten it.
                        self.interest[GUEST] = EventFlags::empty();
                        return Ok(());
                    }
                    Err(_) => return Err(End::Refused(Verdict::Failed)),
                },
                Stage::Open(splice) => {
                    let over = splice.pump(&self.host, scratch).map_err(|_| End::Over)?;
                    return if over { Err(End::Over) } else { Ok(()) };
                }
            }
        }
    }

    /// The guest's server has accepted.
    fn join(&mut self) {
        match std::mem::replace(&mut self.stage, Stage::Header { read: Vec::new() }) {
            Stage::Connecting { socket, .. } => {
                // Neither side is asked to wait for more.
                let _ = sockopt::set_tcp_nodelay(&socket, true);
                tell(&self.host, Verdict::Connected);
                self.stage = Stage::Open(Splice::new(socket));
            }
            other => self.stage = other,
        }
    }

    /// Brings what epoll watches in line with what can be done.
    fn watch(&mut self, epoll: &OwnedFd, id: u32) -> rustix::io::Result<()> {
        let (wanted, guest) = match &self.stage {
            Stage::Header { .. } => ([EventFlags::IN, EventFlags::empty()], None),
            Stage::Connecting { socket, .. } => ([EventFlags::empty(), EventFlags::OUT], Some(socket)),
            Stage::Open(splice) => (splice.wanted(), Some(splice.guest())),
        };
        for side in [HOST, GUEST] {
            let (wanted, before) = (wanted[side], self.interest[side]);
            let stream = if side == HOST { Some(&self.host) } else { guest };
            let Some(stream) = stream.filter(|_| wanted != before) else { continue };
            let data = token(id, FORWARDED[side]);
            match (before.is_empty(), wanted.is_empty()) {
                (true, _) => epoll::add(epoll, stream.as_fd(), data, wanted)?,
                (false, true) => epoll::delete(epoll, stream.as_fd())?,
                (false, false) => epoll::modify(epoll, stream.as_fd(), data, wanted)?,
            }
            self.interest[side] = wanted;
        }
        Ok(())
    }
}

/// Begins to connect to a port of the loopback, by IPv4 or, at last, by IPv6.
fn connect(port: u16, last: bool) -> Result<Stage, End> {
    let (family, address) = if last {
        (AddressFamily::INET6, SocketAddr::from((Ipv6Addr::LOCALHOST, port)))
    } else {
        (AddressFamily::INET, SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = match rustix::net::socket_with(family, SocketType::STREAM, flags, None) {
        Ok(socket) => socket,
        // A kernel without IPv6: nobody can listen there.
        Err(Errno::AFNOSUPPORT) => return Err(End::Refused(Verdict::Closed)),
        Err(_) => return Err(End::Refused(Verdict::Failed)),
    };
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => Ok(Stage::Connecting { socket, port, last }),
        Err(errno) => refused(errno, port, last),
    }
}

/// What follows a failed attempt.
fn refused(errno: Errno, port: u16, last: bool) -> Result<Stage, End> {
    match errno {
        Errno::CONNREFUSED | Errno::ADDRNOTAVAIL | Errno::NETUNREACH if !last => connect(port, true),
        Errno::CONNREFUSED | Errno::ADDRNOTAVAIL | Errno::NETUNREACH => Err(End::Refused(Verdict::Closed)),
        _ => Err(End::Refused(Verdict::Failed)),
    }
}

/// Nothing was written to the stream before, so one that does not take a byte is gone.
fn tell(host: &OwnedFd, verdict: Verdict) {
    let _ = rustix::io::write(host, &[verdict as u8]);
}
