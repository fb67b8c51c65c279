//! Outgoing bytes of a connection: written at once when the stream takes them, else by a task, never half a frame.
//!
//! A caller may be cancelled at any await; so no caller writes across one.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex},
};

use tokio::{net::unix::OwnedWriteHalf, sync::Notify};

/// Bytes waiting beyond which [`Outbox::room`] waits.
const HIGH_WATER: usize = 256 << 10;

#[derive(Debug, Default)]
struct State {
    pending: VecDeque<u8>,
    closed: bool,
}

/// The sending half of a connection.
#[derive(Debug)]
pub struct Outbox(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    half: OwnedWriteHalf,
    state: Mutex<State>,
    work: Notify,
    drained: Notify,
}

impl Outbox {
    /// Starts the task that writes what did not fit at once. It ends when the outbox is closed or dropped.
    pub fn start(half: OwnedWriteHalf) -> Self {
        let state = Mutex::new(State::default());
        let inner = Arc::new(Inner { half, state, work: Notify::new(), drained: Notify::new() });
        tokio::spawn(inner.clone().run());
        Self(inner)
    }

    /// Refuses further frames and drops those that wait.
    pub fn close(&self) {
        self.0.lock(|state| state.close());
        self.0.drained.notify_waiters();
        self.0.work.notify_one();
    }

    /// Waits until there is room for more.
    pub async fn room(&self) {
        loop {
            let drained = self.0.drained.notified();
            if self.0.lock(|state| state.closed || state.pending.len() < HIGH_WATER) {
                return;
            }
            drained.await;
        }
    }

    /// Sends a whole frame, or keeps what the stream does not take yet.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.0.lock(|state| {
            if state.closed {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let written = if state.pending.is_empty() { self.0.write(frame, state)? } else { 0 };
            if written < frame.len() {
                state.pending.extend(&frame[written..]);
                self.0.work.notify_one();
            }
            Ok(())
        })
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.close();
    }
}

impl State {
    fn close(&mut self) {
        self.closed = true;
        self.pending = VecDeque::new();
    }
}

impl Inner {
    async fn run(self: Arc<Self>) {
        loop {
            let (waiting, closed) = self.lock(|state| (!state.pending.is_empty(), state.closed));
            if closed {
                return;
            }
            tokio::select! {
                // Its error shows at the next write.
                _ = self.half.writable(), if waiting => {
                    self.lock(|state| self.flush(state));
                    self.drained.notify_waiters();
                }
                () = self.work.notified() => {}
            }
        }
    }

    fn flush(&self, state: &mut State) {
        while !state.pending.is_empty() {
            let (front, _) = state.pending.as_slices();
            match self.half.try_write(front) {
                Ok(written) => drop(state.pending.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => state.close(),
            }
        }
    }

    fn write(&self, frame: &[u8], state: &mut State) -> io::Result<usize> {
        match self.half.try_write(frame) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => {
                state.close();
                Err(error)
            }
            written => written,
        }
    }

    fn lock<T>(&self, body: impl FnOnce(&mut State) -> T) -> T {
        body(&mut self.state.lock().expect("no panic under this lock"))
    }
}
