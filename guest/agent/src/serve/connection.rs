//! One host connection: frames in, frames out, both bounded.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use forkling_proto::rpc::{FrameError, HEADER_LEN, Header, Kind, MAX_PAYLOAD};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

/// Unsent bytes from which on a connection counts as congested.
const CONGESTED: usize = 256 * 1024;

/// Bytes read from a connection at once.
const CHUNK: usize = 64 * 1024;

/// What reading a connection gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Bytes.
    Some,
    /// Nothing for now.
    Nothing,
    /// The host has closed it.
    End,
}

/// A stream and its buffers.
#[derive(Debug)]
pub struct Connection {
    stream: OwnedFd,
    input: Vec<u8>,
    /// Bytes at the start of `input` that are frames already handed out.
    consumed: usize,
    output: Vec<u8>,
    /// Bytes at the start of `output` that are sent.
    sent: usize,
    /// A command of this connection does not take its input: nothing more is read.
    pub stalled: bool,
    /// The outputs of its commands are not watched, because it is congested.
    pub paused: bool,
    /// Its running commands: the host's number and the server's id.
    pub calls: BTreeMap<u32, u32>,
    /// Events last asked of epoll.
    pub interest: EventFlags,
}

impl Connection {
    /// Wraps a non-blocking stream.
    pub fn new(stream: OwnedFd) -> Self {
        Self {
            stream,
            input: Vec::with_capacity(4096),
            consumed: 0,
            output: Vec::with_capacity(4096),
            sent: 0,
            stalled: false,
            paused: false,
            calls: BTreeMap::new(),
            interest: EventFlags::empty(),
        }
    }

    /// Descriptor for epoll.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Reads once. A frame and a chunk are the most that is ever held.
    pub fn fill(&mut self) -> io::Result<Fill> {
        self.input.drain(..self.consumed);
        self.consumed = 0;
        self.input.reserve(CHUNK);
        match rustix::io::read(&self.stream, rustix::buffer::spare_capacity(&mut self.input)) {
            Ok(0) => Ok(Fill::End),
            Ok(_) => Ok(Fill::Some),
            Err(Errno::AGAIN | Errno::INTR) => Ok(Fill::Nothing),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The next complete frame that was read.
    pub fn next_frame(&mut self) -> Result<Option<(Header, Vec<u8>)>, FrameError> {
        let rest = &self.input[self.consumed..];
        let Some((header, rest)) = rest.split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let header = Header::decode(header)?;
        let Some(payload) = rest.get(..header.len as usize) else { return Ok(None) };
        let payload = payload.to_vec();
        self.consumed += HEADER_LEN + payload.len();
        Ok(Some((header, payload)))
    }

    /// Queues a frame.
    ///
    /// # Panics
    /// When `payload` is longer than [`MAX_PAYLOAD`].
    pub fn send(&mut self, call: u32, kind: Kind, payload: &[u8]) {
        assert!(payload.len() <= MAX_PAYLOAD, "callers split payloads");
        let header = Header { len: payload.len() as u32, call, kind };
        self.output.extend_from_slice(&header.encode());
        self.output.extend_from_slice(payload);
    }

    /// Sends what the stream takes.
    pub fn flush(&mut self) -> io::Result<()> {
        while self.unsent() > 0 {
            match rustix::io::write(&self.stream, &self.output[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(errno.into()),
            }
        }
        // Moving the rest to the front is worth it only when the rest is the smaller part.
        if self.sent >= self.unsent() {
            self.output.drain(..self.sent);
            self.sent = 0;
        }
        Ok(())
    }

    /// Bytes queued and not sent.
    pub fn unsent(&self) -> usize {
        self.output.len() - self.sent
    }

    /// Whether the host is so far behind that no more output may be produced.
    pub fn is_congested(&self) -> bool {
        self.unsent() >= CONGESTED
    }

    /// Events this connection needs now. The end of the stream is always of interest: commands die with it.
    pub fn wanted(&self) -> EventFlags {
        let mut wanted = EventFlags::RDHUP;
        wanted.set(EventFlags::IN, !self.stalled);
        wanted.set(EventFlags::OUT, self.unsent() > 0);
        wanted
    }
}

#[cfg(test)]
mod tests;
