//! The pager's thread.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::{io, mem};

use crossbeam::channel;

use forkling_vmm::snapshot::{CHUNK, ChunkBuffer, ChunkReader};
use forkling_vmm::sys::uffd::{Fault, FaultBuffer, Uffd};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use super::{Backing, Command, Counters, Done, Error, Event, ForkId};

/// Wakes the thread for a command. No fork has this number.
pub(super) const WAKER: Token = Token(usize::MAX);

/// Faults answered for one fork before the next has its turn.
const TURN: usize = 64;

/// Times a thread may come back for one page that is in memory. More than a few mean that its mapping is of another
/// image, and it would come back for ever.
const MOST_REPEATS: u32 = 1000;

/// Pages watched for repeats; more are begun anew.
const WATCHED: usize = 256;

/// Events taken from the kernel at a time.
const EVENTS: usize = 256;

/// A fork the pager serves.
pub(super) struct Served {
    id: ForkId,
    backing: Arc<Backing>,
    uffd: Uffd,
    base: u64,
    /// How often threads came for pages that were in memory.
    repeats: HashMap<u64, u32>,
    /// Given up: left waiting until it is removed.
    failed: bool,
    /// In [`Worker::turns`].
    queued: bool,
}

impl Served {
    pub(super) fn new(id: ForkId, backing: Arc<Backing>, uffd: Uffd, base: u64) -> Self {
        Self { id, backing, uffd, base, repeats: HashMap::new(), failed: false, queued: false }
    }

    /// The chunk a fault is in.
    fn chunk_of(&self, fault: &Fault) -> Result<u64, Error> {
        let address = fault.address;
        let offset = address.checked_sub(self.base).filter(|&offset| offset < self.backing.image().len());
        offset.map(|offset| offset / CHUNK as u64).ok_or(Error::Address { address })
    }

    /// Notes a fault on memory that is there: its chunk came while the thread was on its way, or it never helps.
    fn note_late(&mut self, fault: &Fault) -> Result<(), Error> {
        if self.repeats.len() >= WATCHED {
            self.repeats.clear();
        }
        let repeats = self.repeats.entry(fault.address).or_default();
        *repeats += 1;
        if *repeats > MOST_REPEATS { Err(Error::Repeated { address: fault.address }) } else { Ok(()) }
    }

    /// Lets all threads of the fork go on that wait for the chunk.
    fn wake(&self, chunk: u64) -> Result<(), Error> {
        self.uffd.wake(self.base + chunk * CHUNK as u64, CHUNK as u64).map_err(Error::Faults)
    }
}

/// An image that is being loaded completely.
struct Load {
    backing: Arc<Backing>,
    /// All chunks before this one are in memory or zero.
    next: u64,
    done: Done,
}

pub(super) struct Worker {
    poll: Poll,
    commands: channel::Receiver<Command>,
    counters: Arc<Counters>,
    events: Box<dyn FnMut(Event) + Send>,
    forks: HashMap<ForkId, Served>,
    /// Forks that may have faults to read.
    turns: VecDeque<ForkId>,
    loads: VecDeque<Load>,
    scratch: Scratch,
}

/// Buffers, made once.
struct Scratch {
    reader: ChunkReader,
    chunk: Box<ChunkBuffer>,
    buffer: FaultBuffer,
    faults: Vec<Fault>,
}

/// What the thread does until it is stopped.
pub(super) fn run(mut worker: Worker) {
    let outcome = catch_unwind(AssertUnwindSafe(|| worker.serve_until_stopped()));
    if !matches!(outcome, Ok(Ok(()))) {
        tracing::error!("the pager ends by a fault of its own: {outcome:?}");
        // Closing the userfaultfds would let the forks go on with zeros before anyone can kill them.
        mem::forget(mem::take(&mut worker.forks));
        (worker.events)(Event::Stopped);
    }
    for load in worker.loads.drain(..) {
        (load.done)(Err(Error::Abandoned.failure()));
    }
}

impl Worker {
    pub(super) fn new(
        poll: Poll,
        commands: channel::Receiver<Command>,
        counters: Arc<Counters>,
        events: Box<dyn FnMut(Event) + Send>,
    ) -> Result<Self, Error> {
        let scratch = Scratch {
            reader: ChunkReader::new()?,
            chunk: Box::new([0; CHUNK]),
            buffer: FaultBuffer::new(TURN),
            faults: Vec::with_capacity(TURN),
        };
        let (forks, turns, loads) = Default::default();
        Ok(Self { poll, commands, counters, events, forks, turns, loads, scratch })
    }

    fn serve_until_stopped(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(EVENTS);
        loop {
            let busy = !self.turns.is_empty() || !self.loads.is_empty();
            match self.poll.poll(&mut events, busy.then_some(Duration::ZERO)) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            }
            for event in &events {
                match event.token() {
                    WAKER => {}
                    Token(number) => self.queue(ForkId(number as u64)),
                }
            }
            if self.obey()? {
                return Ok(());
            }
            for _ in 0..self.turns.len() {
                self.take_turn();
            }
            // Loading yields to faults.
            if self.turns.is_empty() {
                self.load_one();
            }
        }
    }

    /// Carries out the commands that wait; true to stop.
    fn obey(&mut self) -> io::Result<bool> {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::AddFork(fork) => self.add(fork),
                Command::RemoveFork(id) => self.remove(id)?,
                Command::Load(backing, done) => self.loads.push_back(Load { backing, next: 0, done }),
                Command::Stop => return Ok(true),
            }
        }
        Ok(false)
    }

    fn add(&mut self, fork: Served) {
        let id = fork.id;
        let token = Token(usize::try_from(id.0).expect("64 bits"));
        let fd = fork.uffd.as_fd().as_raw_fd();
        let registered = self.poll.registry().register(&mut SourceFd(&fd), token, Interest::READABLE);
        self.forks.insert(id, fork);
        match registered {
            Ok(()) => self.queue(id),
            Err(error) => self.give_up(id, &Error::Faults(error)),
        }
    }

    fn remove(&mut self, id: ForkId) -> io::Result<()> {
        let Some(fork) = self.forks.remove(&id) else { return Ok(()) };
        if !fork.failed {
            self.poll.registry().deregister(&mut SourceFd(&fork.uffd.as_fd().as_raw_fd()))?;
        }
        Ok(())
    }

    fn queue(&mut self, id: ForkId) {
        if let Some(fork) = self.forks.get_mut(&id)
            && !fork.queued
            && !fork.failed
        {
            fork.queued = true;
            self.turns.push_back(id);
        }
    }

    /// Answers the faults of the next fork; it comes again if it had any, for readiness is told only once.
    fn take_turn(&mut self) {
        let Some(id) = self.turns.pop_front() else { return };
        let Some(fork) = self.forks.get_mut(&id) else { return };
        fork.queued = false;
        match answer(fork, &mut self.scratch, &self.counters) {
            Ok(0) => {}
            Ok(_) => self.queue(id),
            Err(error) => self.give_up(id, &error),
        }
    }

    /// Reports a fork and leaves it waiting.
    fn give_up(&mut self, id: ForkId, error: &Error) {
        let Some(fork) = self.forks.get_mut(&id) else { return };
        fork.failed = true;
        // Fails when it never was registered.
        let _ = self.poll.registry().deregister(&mut SourceFd(&fork.uffd.as_fd().as_raw_fd()));
        self.counters.failures.fetch_add(1, Ordering::Relaxed);
        let failure = error.failure();
        tracing::warn!(fork = id.0, "fork cannot be given its memory: {}", failure.message);
        (self.events)(Event::Failed { fork: id, failure });
    }

    /// Loads one chunk of the first image that is to be loaded.
    fn load_one(&mut self) {
        let Some(load) = self.loads.front_mut() else { return };
        let missing = (load.next..load.backing.chunks()).find(|&chunk| load.backing.is_missing_data(chunk));
        let fetched = match missing {
            Some(chunk) => {
                load.next = chunk + 1;
                let Scratch { reader, chunk: buffer, .. } = &mut self.scratch;
                load.backing.fetch(chunk, reader, buffer, &self.counters)
            }
            None => Ok(false),
        };
        if matches!(fetched, Ok(true)) {
            return;
        }
        let load = self.loads.pop_front().expect("looked at above");
        (load.done)(fetched.map(drop).map_err(|error| error.failure()));
    }
}

/// Answers the faults a fork has, at most [`TURN`]; returns their number.
fn answer(fork: &mut Served, scratch: &mut Scratch, counters: &Counters) -> Result<usize, Error> {
    scratch.faults.clear();
    fork.uffd.read_faults(&mut scratch.buffer, &mut scratch.faults).map_err(Error::Faults)?;
    for fault in &scratch.faults {
        let chunk = fork.chunk_of(fault)?;
        let fetched = fork.backing.fetch(chunk, &mut scratch.reader, &mut scratch.chunk, counters)?;
        counters.faults.fetch_add(1, Ordering::Relaxed);
        if !fetched {
            counters.late_faults.fetch_add(1, Ordering::Relaxed);
            fork.note_late(fault)?;
        }
        fork.wake(chunk)?;
    }
    Ok(scratch.faults.len())
}
