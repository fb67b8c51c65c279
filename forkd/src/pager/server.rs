//! The pager's thread: reads faults, puts chunks into images, wakes who waits. It never waits for a disk.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use std::{io, mem};

use crossbeam::channel;
use forkling_vmm::sys::uffd::{Fault, FaultBuffer};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use super::backing::{Piece, Place};
use super::fetch::{Fetched, Fetchers, Job, Lane};
use super::plan::Plan;
use super::served::Served;
use super::{Backing, Command, Counters, Error, Event, ForkId};

/// Wakes the thread for a command or a chunk. No fork has this number.
pub(super) const WAKER: Token = Token(usize::MAX);

/// Faults answered for one fork before the next has its turn.
const TURN: usize = 64;

/// Events taken from the kernel at a time.
const EVENTS: usize = 256;

/// How often it is looked whether a chunk takes too long.
const TICK: Duration = Duration::from_millis(250);

/// How long a chunk may lie untouched while a fork waits, before the threads that read are taken for stuck.
const UNTOUCHED: Duration = Duration::from_secs(1);

/// Identifies a piece of an image that is alive.
type Key = (usize, Piece);

/// A piece on its way.
struct Pending {
    job: Arc<Job>,
    /// Forks that wait for it, each once.
    waiters: Vec<ForkId>,
    /// Since when.
    since: Instant,
}

pub(super) struct Server {
    poll: Poll,
    commands: channel::Receiver<Command>,
    fetched: channel::Receiver<Fetched>,
    fetchers: Fetchers,
    counters: Arc<Counters>,
    events: Box<dyn FnMut(Event) + Send>,
    forks: HashMap<ForkId, Served>,
    /// Forks that may have faults to read.
    turns: VecDeque<ForkId>,
    pending: HashMap<Key, Pending>,
    plan: Plan,
    patience: Duration,
    last_tick: Instant,
    scratch: Scratch,
}

/// Buffers, made once.
struct Scratch {
    buffer: FaultBuffer,
    faults: Vec<Fault>,
}

/// What the thread does until it is stopped.
pub(super) fn run(mut server: Server) {
    let ended = Ended(&mut server);
    match ended.0.serve_until_stopped() {
        // Nobody has to be told.
        Ok(()) => {
            ended.0.plan.abandon_all();
            mem::forget(ended);
        }
        Err(error) => tracing::error!(%error, "the pager ends by a fault of its own"),
    }
}

/// Tells the end of a thread that was not asked to end, by an error or by a panic that did not end the process.
struct Ended<'a>(&'a mut Server);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        // Closing the userfaultfds would let the forks go on with zeros before anyone can kill them.
        mem::forget(mem::take(&mut self.0.forks));
        self.0.plan.abandon_all();
        (self.0.events)(Event::Stopped);
    }
}

impl Server {
    pub(super) fn new(
        poll: Poll,
        waker: Arc<mio::Waker>,
        commands: channel::Receiver<Command>,
        counters: Arc<Counters>,
        events: Box<dyn FnMut(Event) + Send>,
        patience: Duration,
    ) -> Self {
        let (results, fetched) = channel::unbounded();
        let (forks, turns, pending) = Default::default();
        let scratch = Scratch { buffer: FaultBuffer::new(TURN), faults: Vec::with_capacity(TURN) };
        let (fetchers, last_tick) = (Fetchers::new(results, waker), Instant::now());
        let plan = Plan::new(fetchers.threads());
        Self {
            poll,
            commands,
            fetched,
            fetchers,
            counters,
            events,
            forks,
            turns,
            pending,
            plan,
            patience,
            last_tick,
            scratch,
        }
    }

    fn serve_until_stopped(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(EVENTS);
        loop {
            match self.poll.poll(&mut events, self.timeout()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            }
            for event in &events {
                match event.token() {
                    WAKER => {}
                    Token(number) => self.queue(ForkId(number as u64)),
                }
            }
            if self.obey() {
                return Ok(());
            }
            while let Ok(fetched) = self.fetched.try_recv() {
                self.receive(fetched);
            }
            for _ in 0..self.turns.len() {
                self.take_turn();
            }
            self.read_ahead();
            self.look_for_the_late();
        }
    }

    fn timeout(&self) -> Option<Duration> {
        if !self.turns.is_empty() {
            return Some(Duration::ZERO);
        }
        let tick = self.pending.values().any(|pending| !pending.waiters.is_empty()).then_some(TICK);
        [tick, self.plan.rest_begins_in()].into_iter().flatten().min()
    }

    /// Carries out the commands that wait; true to stop.
    fn obey(&mut self) -> bool {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::AddFork(fork) => self.add(fork),
                Command::RemoveFork(id) => self.remove(id),
                Command::Warm => self.fetchers.warm(),
                Command::Prefetch(backing, pieces) => self.plan.add_batch(backing, pieces),
                Command::ReadOn(backing, pieces) => self.plan.add_later(backing, pieces),
                Command::Load(backing, done) => self.plan.add_load(backing, done),
                Command::Abandon(backing) => self.plan.abandon(&backing),
                Command::Stop => return true,
            }
        }
        false
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

    fn remove(&mut self, id: ForkId) {
        let Some(fork) = self.forks.remove(&id) else { return };
        fork.let_go();
        // Closing it, next, takes it out of the poll too; a fork that was given up is out already.
        let _ = self.poll.registry().deregister(&mut SourceFd(&fork.uffd.as_fd().as_raw_fd()));
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
        self.scratch.faults.clear();
        let read = fork.uffd.read_faults(&mut self.scratch.buffer, &mut self.scratch.faults);
        let faults = mem::take(&mut self.scratch.faults);
        let outcome = read
            .map_err(Error::Faults)
            .and_then(|()| faults.iter().try_for_each(|fault| self.answer(id, fault)));
        match outcome {
            Ok(()) if faults.is_empty() => {}
            Ok(()) => self.queue(id),
            Err(error) => self.give_up(id, &error),
        }
        self.scratch.faults = faults;
    }

    /// Resolves a fault, or sees to it that its chunk comes.
    fn answer(&mut self, id: ForkId, fault: &Fault) -> Result<(), Error> {
        let Some(fork) = self.forks.get_mut(&id) else { return Ok(()) };
        let page = fork.page_of(fault)?;
        let backing = Arc::clone(&fork.backing);
        let place = backing.place(page);
        backing.note_fault(place);
        self.counters.faults.fetch_add(1, Ordering::Relaxed);
        match place {
            Place::Zero => {
                self.counters.zero_faults.fetch_add(1, Ordering::Relaxed);
                fork.show_zeros(page, fault)
            }
            Place::Memory => {
                self.counters.late_faults.fetch_add(1, Ordering::Relaxed);
                fork.note_late(fault)?;
                fork.wake(&[(page, 1)])
            }
            Place::Disk(piece) => {
                tracing::trace!(page, ?piece, "a fork waits for memory");
                self.plan.note_fault();
                self.want(&backing, piece, Lane::Fault)?;
                let pending = self.pending.get_mut(&key(&backing, piece)).expect("it is on its way");
                if pending.waiters.is_empty() {
                    pending.since = Instant::now();
                }
                if !pending.waiters.contains(&id) {
                    pending.waiters.push(id);
                }
                Ok(())
            }
        }
    }

    /// Has a piece read that is on disk; one that is on its way comes sooner if a fork waits for it now.
    fn want(&mut self, backing: &Arc<Backing>, piece: Piece, lane: Lane) -> Result<(), Error> {
        let job = Job::new(Arc::clone(backing), piece, lane);
        let now = Instant::now();
        if let Some(pending) = self.pending.get_mut(&key(backing, piece)) {
            let before = pending.job.lane;
            if before == Lane::Fault || lane != Lane::Fault {
                return Ok(());
            }
            let replaced = pending.job.take();
            // A prompt thread that is at it already is soon done; that of the rest may not run for long.
            if !replaced && before == Lane::Batch {
                return Ok(());
            }
            if replaced {
                self.plan.note_fetched(before);
            }
            pending.job = Arc::clone(&job);
            return self.fetchers.push(job);
        }
        backing.claim(piece);
        if let Err(error) = self.fetchers.push(Arc::clone(&job)) {
            backing.release(piece);
            return Err(error);
        }
        self.pending.insert(key(backing, piece), Pending { job, waiters: Vec::new(), since: now });
        Ok(())
    }

    /// Puts a piece into its image and wakes who waits for it, or tells them that it cannot be had.
    fn receive(&mut self, fetched: Fetched) {
        let Fetched { job, outcome } = fetched;
        self.plan.note_fetched(job.lane);
        let backing = &job.backing;
        // Read twice: by the thread of the rest, and sooner for a fork.
        let Some(pending) = self.pending.remove(&key(backing, job.piece)) else {
            return outcome.map_or((), |buffer| self.fetchers.recycle(buffer));
        };
        let inserted = match outcome {
            Ok(buffer) => {
                let inserted = backing.insert(job.piece, &buffer, job.lane);
                self.fetchers.recycle(buffer);
                inserted
            }
            Err(error) => Err(error),
        };
        match (inserted, job.piece) {
            (Ok(foreign), piece) => {
                let chunks = u64::from(matches!(piece, Piece::Chunk(_)));
                self.counters.chunks_read.fetch_add(chunks, Ordering::Relaxed);
                self.counters.foreign_pages.fetch_add(foreign as u64, Ordering::Relaxed);
                self.wake(pending.waiters, backing, piece);
                self.plan.finish(backing);
            }
            (Err(error), Piece::Chunk(_)) => {
                backing.release(job.piece);
                for id in pending.waiters {
                    self.give_up(id, &error);
                }
                self.plan.fail(backing, &error);
            }
            // Copies only: who comes again is given the chunk.
            (Err(error), Piece::Segment(_)) => {
                tracing::warn!("pages of a recorded working set are of no use: {}", error.failure().message);
                backing.release(job.piece);
                self.wake(pending.waiters, backing, job.piece);
            }
        }
    }

    /// Lets forks go on that wait for a piece.
    fn wake(&mut self, waiters: Vec<ForkId>, backing: &Backing, piece: Piece) {
        if waiters.is_empty() {
            return;
        }
        let runs = backing.runs_of(piece);
        for id in waiters {
            let woken = self.forks.get(&id).filter(|fork| !fork.failed).map(|fork| fork.wake(&runs));
            if let Some(Err(error)) = woken {
                self.give_up(id, &error);
            }
        }
    }

    /// Keeps the threads busy with what nobody waits for.
    fn read_ahead(&mut self) {
        loop {
            let pending = &self.pending;
            let next = self.plan.next(|backing, piece| pending.contains_key(&key(backing, piece)));
            let Some((backing, piece, lane)) = next else { return };
            if let Err(error) = self.want(&backing, piece, lane) {
                self.plan.note_fetched(lane);
                self.plan.fail(&backing, &error);
            }
        }
    }

    /// Gives up forks that have waited too long for a chunk. It may still come, for others.
    fn look_for_the_late(&mut self) {
        let now = Instant::now();
        if now.duration_since(self.last_tick) < TICK {
            return;
        }
        self.last_tick = now;
        let (mut late, mut stuck) = (Vec::new(), false);
        for pending in self.pending.values_mut().filter(|pending| !pending.waiters.is_empty()) {
            let waited = now.duration_since(pending.since);
            stuck |= waited > UNTOUCHED && !pending.job.is_taken();
            if waited > self.patience {
                late.append(&mut pending.waiters);
            }
        }
        if stuck && let Err(error) = self.fetchers.grow() {
            tracing::warn!(%error, "no further thread for the pager");
        }
        for id in late {
            self.give_up(id, &Error::Late { seconds: self.patience.as_secs() });
        }
    }

    /// Reports a fork and leaves it waiting.
    fn give_up(&mut self, id: ForkId, error: &Error) {
        let Some(fork) = self.forks.get_mut(&id).filter(|fork| !fork.failed) else { return };
        fork.failed = true;
        // Fails when it never was registered.
        let _ = self.poll.registry().deregister(&mut SourceFd(&fork.uffd.as_fd().as_raw_fd()));
        self.counters.failures.fetch_add(1, Ordering::Relaxed);
        let failure = error.failure();
        tracing::warn!(fork = id.0, "fork cannot be given its memory: {}", failure.message);
        (self.events)(Event::Failed { fork: id, failure });
    }
}

fn key(backing: &Arc<Backing>, piece: Piece) -> Key {
    // The jobs hold the image, so its address is its own as long as the key is used.
    (Arc::as_ptr(backing) as usize, piece)
}
