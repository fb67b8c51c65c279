//! Both directions between two streams, each with a bounded buffer and an end of its own.

use std::os::fd::OwnedFd;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, send, shutdown};

/// Most reads of a direction in one go, so that no stream holds up the others.
const TURNS: usize = 8;

/// One direction.
#[derive(Debug, Default)]
struct Flow {
    /// Read and not written yet; at most what is read at once.
    waiting: Vec<u8>,
    /// Bytes at the start of `waiting` that are written.
    written: usize,
    /// The source sends no more.
    ended: bool,
    /// And the sink was told.
    told: bool,
}

impl Flow {
    /// Moves what can be moved now. `scratch` is where bytes pass through.
    fn pump(&mut self, from: &OwnedFd, to: &OwnedFd, scratch: &mut [u8]) -> rustix::io::Result<()> {
        for _ in 0..TURNS {
            if !self.flush(to)? {
                return Ok(());
            }
            if self.ended {
                return self.end(to);
            }
            let count = match rustix::io::read(from, &mut *scratch) {
                Ok(count) => count,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno),
            };
            self.ended = count == 0;
            let taken = write(to, &scratch[..count])?;
            self.waiting.extend_from_slice(&scratch[taken..count]);
        }
        // No event would tell of an end that was the last to be read.
        if self.ended && self.flush(to)? { self.end(to) } else { Ok(()) }
    }

    /// Writes what waits. True: nothing does any more.
    fn flush(&mut self, to: &OwnedFd) -> rustix::io::Result<bool> {
        self.written += write(to, &self.waiting[self.written..])?;
        if self.written < self.waiting.len() {
            return Ok(false);
        }
        // An idle stream holds no memory.
        (self.waiting, self.written) = (Vec::new(), 0);
        Ok(true)
    }

    fn end(&mut self, to: &OwnedFd) -> rustix::io::Result<()> {
        if !std::mem::replace(&mut self.told, true) {
            match shutdown(to, Shutdown::Write) {
                // It has gone meanwhile, which its own direction shows.
                Ok(()) | Err(Errno::NOTCONN) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    fn wants_input(&self) -> bool {
        !self.ended && self.waiting.is_empty()
    }
}

/// A stream of the host joined with one of the guest.
#[derive(Debug)]
pub struct Splice {
    guest: OwnedFd,
    inward: Flow,
    outward: Flow,
}

impl Splice {
    /// With `guest`, a connected stream that does not block.
    pub fn new(guest: OwnedFd) -> Self {
        Self { guest, inward: Flow::default(), outward: Flow::default() }
    }

    /// The guest's side.
    pub fn guest(&self) -> &OwnedFd {
        &self.guest
    }

    /// Moves what can be moved now, both ways. True: both directions have ended. Errors: one of the sides is gone.
    pub fn pump(&mut self, host: &OwnedFd, scratch: &mut [u8]) -> rustix::io::Result<bool> {
        self.inward.pump(host, &self.guest, scratch)?;
        self.outward.pump(&self.guest, host, scratch)?;
        Ok(self.inward.told && self.outward.told)
    }

    /// Events with which more could be moved: of the host's side, and of the guest's.
    pub fn wanted(&self) -> [EventFlags; 2] {
        [(&self.inward, &self.outward), (&self.outward, &self.inward)].map(|(from, to)| {
            let mut wanted = EventFlags::empty();
            wanted.set(EventFlags::IN, from.wants_input());
            wanted.set(EventFlags::OUT, !to.waiting.is_empty());
            wanted
        })
    }
}

/// Writes what `to` takes at once.
fn write(to: &OwnedFd, data: &[u8]) -> rustix::io::Result<usize> {
    let mut taken = 0;
    while taken < data.len() {
        match send(to, &data[taken..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(count) => taken += count,
            Err(Errno::AGAIN) => break,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(taken)
}
