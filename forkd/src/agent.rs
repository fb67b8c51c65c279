//! Calls to a guest's agent: frames of [`forkling_proto::rpc`] over one stream, many calls side by side.
//!
//! The guest is hostile: a frame that is too long, unknown, or for no open call ends the connection or is dropped;
//! nothing from it is believed beyond the call it answers.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

use forkling_proto::rpc::{self, CallError, Exit, HEADER_LEN, Header, Kind, MAX_PAYLOAD};
use serde::de::DeserializeOwned;
use tokio::{
    io::{AsyncReadExt, BufReader},
    net::{UnixStream, unix::OwnedReadHalf},
    sync::mpsc,
    task::AbortHandle,
};

use outbox::Outbox;

mod outbox;

/// Frames a call may lag behind before its connection waits for it.
const LAG: usize = 16;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection ended before the call did.
    #[error("the connection to the guest's agent ended")]
    Lost,
    /// The agent said nothing for too long.
    #[error("the guest's agent did not answer in time")]
    Silent,
    /// The agent refused the call.
    #[error("the guest's agent refused the call")]
    Refused(CallError),
    /// The agent broke the protocol.
    #[error("the guest's agent sent a malformed {0}")]
    Malformed(&'static str),
    /// The stream failed.
    #[error("stream to the guest's agent: {0}")]
    Io(#[from] io::Error),
}

/// What an agent says during a call.
#[derive(Debug)]
pub enum Event {
    /// The command runs with this process id.
    Started(u32),
    /// Standard output.
    Stdout(Vec<u8>),
    /// Standard error.
    Stderr(Vec<u8>),
    /// The command ended; the call is over.
    Exit(Exit),
    /// Ping or freeze was answered; the call is over.
    Pong,
}

type Frame = (Kind, Vec<u8>);

/// A stream to an agent.
#[derive(Debug)]
pub struct Connection {
    outbox: Outbox,
    /// Where frames of open calls go; `None` when the stream has ended.
    calls: Mutex<Option<HashMap<u32, mpsc::Sender<Frame>>>>,
    next: AtomicU32,
    reader: OnceLock<AbortHandle>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(reader) = self.reader.get() {
            reader.abort();
        }
    }
}

impl Connection {
    /// Takes charge of a connected stream.
    pub fn new(stream: UnixStream) -> Arc<Self> {
        let (reader, writer) = stream.into_split();
        let connection = Arc::new(Self {
            outbox: Outbox::start(writer),
            calls: Mutex::new(Some(HashMap::new())),
            next: AtomicU32::new(1),
            reader: OnceLock::new(),
        });
        // The reader holds the connection weakly, and dropping that ends the reader.
        let weak = Arc::downgrade(&connection);
        let task = tokio::spawn(async move {
            let mut reader = BufReader::new(reader);
            while let Some(frame) = read_frame(&mut reader).await {
                let Some(connection) = weak.upgrade() else { return };
                connection.dispatch(frame).await;
            }
            if let Some(connection) = weak.upgrade() {
                connection.calls.lock().expect("no panic under this lock").take();
                connection.outbox.close();
            }
        });
        let _ = connection.reader.set(task.abort_handle());
        connection
    }

    /// Whether calls can still be made.
    pub fn is_open(&self) -> bool {
        self.calls.lock().expect("no panic under this lock").is_some()
    }

    /// Begins a call.
    pub fn call(self: &Arc<Self>, kind: Kind, payload: &[u8]) -> Result<Call, Error> {
        let (sender, frames) = mpsc::channel(LAG);
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        match self.calls.lock().expect("no panic under this lock").as_mut() {
            Some(calls) => calls.insert(id, sender),
            None => return Err(Error::Lost),
        };
        let call = Call { connection: self.clone(), id, frames, over: false };
        call.input().send(kind, payload)?;
        Ok(call)
    }

    /// Makes a call that is answered by [`Event::Pong`]: a ping, or a freeze.
    pub async fn round_trip(self: &Arc<Self>, kind: Kind) -> Result<(), Error> {
        match self.call(kind, &[])?.next().await? {
            Event::Pong => Ok(()),
            _ => Err(Error::Malformed("answer: not a pong")),
        }
    }

    async fn dispatch(&self, (header, payload): (Header, Vec<u8>)) {
        let sender = {
            let mut calls = self.calls.lock().expect("no panic under this lock");
            let Some(calls) = calls.as_mut() else { return };
            if is_last(header.kind) { calls.remove(&header.call) } else { calls.get(&header.call).cloned() }
        };
        // A call that was given up may still get frames.
        if let Some(sender) = sender {
            let _ = sender.send((header.kind, payload)).await;
        }
    }
}

fn is_last(kind: Kind) -> bool {
    matches!(kind, Kind::Pong | Kind::Exit | Kind::Error)
}

async fn read_frame(reader: &mut BufReader<OwnedReadHalf>) -> Option<(Header, Vec<u8>)> {
    let mut bytes = [0; HEADER_LEN];
    reader.read_exact(&mut bytes).await.ok()?;
    let header = Header::decode(&bytes).ok()?;
    let mut payload = vec![0; header.len as usize];
    reader.read_exact(&mut payload).await.ok()?;
    Some((header, payload))
}

/// A call under way. Dropped before its end, its command is killed.
#[derive(Debug)]
pub struct Call {
    connection: Arc<Connection>,
    id: u32,
    frames: mpsc::Receiver<Frame>,
    over: bool,
}

impl Call {
    /// What the agent says next. After [`Event::Exit`], [`Event::Pong`] or an error the call is over.
    pub async fn next(&mut self) -> Result<Event, Error> {
        let Some((kind, payload)) = self.frames.recv().await else {
            self.over = true;
            return Err(Error::Lost);
        };
        self.over = is_last(kind);
        match kind {
            Kind::Started => Ok(Event::Started(parse(&payload, "process id")?)),
            Kind::Stdout => Ok(Event::Stdout(payload)),
            Kind::Stderr => Ok(Event::Stderr(payload)),
            Kind::Exit => Ok(Event::Exit(parse(&payload, "exit status")?)),
            Kind::Pong => Ok(Event::Pong),
            Kind::Error => Err(Error::Refused(parse(&payload, "error")?)),
            Kind::Ping | Kind::Exec | Kind::Stdin | Kind::Signal | Kind::Freeze => {
                Err(Error::Malformed("frame: a request"))
            }
        }
    }

    /// What can be sent to it.
    pub fn input(&self) -> Input {
        Input { connection: self.connection.clone(), call: self.id }
    }
}

/// The sending side of a call.
#[derive(Clone, Debug)]
pub struct Input {
    connection: Arc<Connection>,
    call: u32,
}

impl Input {
    /// Bytes for the command's standard input, waiting while the agent is behind.
    pub async fn stdin(&self, bytes: &[u8]) -> Result<(), Error> {
        // An empty frame would close it.
        for chunk in bytes.chunks(MAX_PAYLOAD) {
            self.connection.outbox.room().await;
            self.send(Kind::Stdin, chunk)?;
        }
        Ok(())
    }

    /// Ends the command's standard input.
    pub fn close(&self) -> Result<(), Error> {
        self.send(Kind::Stdin, &[])
    }

    /// A signal for the command's process group.
    pub fn signal(&self, signal: u8) -> Result<(), Error> {
        self.send(Kind::Signal, &[signal])
    }

    fn send(&self, kind: Kind, payload: &[u8]) -> Result<(), Error> {
        Ok(self.connection.outbox.send(&rpc::frame(self.call, kind, payload))?)
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        const KILL: u8 = 9;
        let _ = self.input().signal(KILL);
        if let Some(calls) = self.connection.calls.lock().expect("no panic under this lock").as_mut() {
            calls.remove(&self.id);
        }
    }
}

fn parse<T: DeserializeOwned>(payload: &[u8], what: &'static str) -> Result<T, Error> {
    postcard::from_bytes(payload).map_err(|_| Error::Malformed(what))
}

#[cfg(test)]
mod tests;
