//! Programs of the workload that wait for a forkpoint on [`FORKPOINT_SOCKET`].
//!
//! Connecting says "I may be forked here". Each connection gets one line, `generation <n>\n`, in every fork made
//! from then on, and is closed; a program that wants to hear of the next fork connects again.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use forkling_proto::config::FORKPOINT_SOCKET;

/// The listening socket and those who wait.
#[derive(Debug)]
pub struct Waiters {
    listener: UnixListener,
    waiting: Vec<UnixStream>,
}

impl Waiters {
    /// Listens on [`FORKPOINT_SOCKET`]; any user may connect.
    pub fn listen() -> io::Result<Self> {
        Self::listen_at(FORKPOINT_SOCKET.as_ref())
    }

    fn listen_at(path: &Path) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, waiting: Vec::new() })
    }

    /// Readable when somebody has connected since the last [`Self::gather`].
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Takes in all who have connected; returns how many wait now.
    pub fn gather(&mut self) -> io::Result<usize> {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(true)?;
                    self.waiting.push(stream);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(self.waiting.len()),
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Tells all who wait that they are in a new fork.
    pub fn release(&mut self, generation: u64) {
        // One write each, so that one read gets the line.
        let line = format!("generation {generation}\n");
        for mut stream in self.waiting.drain(..) {
            // One that has gone away needs no answer.
            let _ = stream.write_all(line.as_bytes());
        }
    }
}

#[cfg(test)]
mod tests;
