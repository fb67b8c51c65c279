//! Fills missing memory: one thread that answers the page faults of all forks, and a few that read for it.
//!
//! A fork whose image is incomplete hands over a userfaultfd. The pager has the missing chunk read from the snapshot and
//! verified, inserts it into the image, which all forks of the template share, and wakes the threads that wait. A chunk is
//! read once, whoever asks for it. Memory that is zero takes no page: the fork is shown the kernel's page of zeros.
//!
//! The pager's own thread reads faults, inserts and wakes, and never touches a disk. What is read comes in this order: what
//! forks wait for, then the recorded working set of templates that are being loaded, then, at the lowest priority and
//! when no fork has waited for a while, the rest of images in use.
//!
//! Invariants:
//! - A fork that cannot be served is reported by [`Event::Failed`] and left waiting, so that it can be killed; it never
//!   goes on with wrong memory. Its userfaultfd stays open until [`Pager::remove_fork`], to be called when the
//!   process is dead: closing it wakes the fork and shows it zeros.
//! - Nobody waits for ever: a chunk that does not come in time is a failure like one that cannot be read.
//! - A failure concerns the forks that need the chunk. The pager goes on for all others.
//! - Nothing a fork sends is trusted: addresses are checked against the registered range.
//! - Every queue is bounded: a chunk is in them once, read-ahead is rationed, and a thread that reads has one buffer.

mod backing;
mod fetch;
mod files;
mod images;
mod plan;
mod served;
mod server;

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use std::{io, thread};

use crossbeam::channel;

use forkling_vmm::memory::image;
use forkling_vmm::memory::layout::PAGE;
use forkling_vmm::protocol::{Failure, FailureKind};
use forkling_vmm::snapshot;
use forkling_vmm::sys::uffd::Uffd;

pub use backing::{Backing, Residency};
pub use files::Files;
pub use images::{Error as ImagesError, Images, News, Opened};
use served::Served;

/// Number of a fork, chosen by the caller, never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ForkId(pub u64);

/// What the pager has to say without being asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// This fork waits for memory that cannot be had. Kill it, then call [`Pager::remove_fork`].
    Failed {
        /// The fork.
        fork: ForkId,
        /// What to tell whoever asked for it.
        failure: Failure,
    },
    /// The pager has ended by a fault of its own. Every fork that was lazily loaded has to be killed.
    Stopped,
}

/// Why the pager refuses a request or cannot serve a fault.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The thread could not be started.
    #[error("cannot start the pager: {0}; check the limits on threads and open files")]
    Start(#[source] io::Error),
    /// The thread has ended.
    #[error("the pager has stopped; restart the daemon")]
    Stopped,
    /// The descriptor cannot be used.
    #[error("the fork sent a descriptor that cannot be used for its page faults: {0}")]
    Descriptor(#[source] io::Error),
    /// The mapping announced by the fork is not one of the image.
    #[error("the fork announced {len} bytes at {base:#x}, not a mapping of its image of {expected} bytes")]
    Mapping {
        /// Announced start.
        base: u64,
        /// Announced length.
        len: u64,
        /// Length of the image.
        expected: u64,
    },
    /// The image has to be complete before its first fork.
    #[error("the image cannot be filled while forks use it; load it completely and fork without userfaultfd")]
    Eager,
    /// A fault outside of the registered range.
    #[error("the fork reported a fault at {address:#x}, outside of its memory")]
    Address {
        /// Where.
        address: u64,
    },
    /// Faults on memory that is there do not end.
    #[error(
        "the fork keeps asking for memory at {address:#x} that it has; it does not map its template's image"
    )]
    Repeated {
        /// Where.
        address: u64,
    },
    /// Faults could not be read or answered.
    #[error("cannot answer page faults of the fork: {0}")]
    Faults(#[source] io::Error),
    /// A chunk could not be read.
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    /// A chunk could not be put into memory.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// A chunk did not come in time.
    #[error(
        "memory of the fork was not read from disk within {seconds} s; check the disk under the state directory"
    )]
    Late {
        /// How long it was waited for.
        seconds: u64,
    },
    /// The load was given up because the template was unloaded or the pager dropped.
    #[error("the template is being unloaded")]
    Abandoned,
}

impl Error {
    /// As it is told to other processes and clients.
    pub fn failure(&self) -> Failure {
        let kind = match self {
            Self::Snapshot(error) if error.is_snapshot_fault() => FailureKind::Snapshot,
            _ => FailureKind::Host,
        };
        let mut message = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            // Most messages name their cause already.
            if !message.contains(&cause.to_string()) {
                message = format!("{message}: {cause}");
            }
            source = cause.source();
        }
        Failure { kind, message }
    }
}

/// Counters since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Faults seen.
    pub faults: u64,
    /// Faults on chunks that were in memory by the time they were looked at.
    pub late_faults: u64,
    /// Chunks read from disk.
    pub chunks_read: u64,
    /// Faults on memory that is zero.
    pub zero_faults: u64,
    /// Pages found in an image that nobody had put there: a fork reads past its userfaultfd.
    pub foreign_pages: u64,
    /// Forks given up.
    pub failures: u64,
}

#[derive(Debug, Default)]
struct Counters {
    faults: AtomicU64,
    late_faults: AtomicU64,
    chunks_read: AtomicU64,
    zero_faults: AtomicU64,
    foreign_pages: AtomicU64,
    failures: AtomicU64,
}

/// What is called when a load has ended.
type Done = Box<dyn FnOnce(Result<(), Failure>) + Send>;

enum Command {
    AddFork(Served),
    RemoveFork(ForkId),
    Warm,
    Prefetch(Arc<Backing>, Vec<backing::Piece>),
    ReadOn(Arc<Backing>, Vec<backing::Piece>),
    Load(Arc<Backing>, Done),
    Abandon(Arc<Backing>),
    Stop,
}

/// The pager's thread. Dropping it ends the thread, with all loads abandoned; no fork may be left by then.
pub struct Pager {
    commands: channel::Sender<Command>,
    waker: Arc<mio::Waker>,
    counters: Arc<Counters>,
    forks: Mutex<HashSet<ForkId>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Pager {
    /// Starts the thread. `events` is called on it and must not block. A chunk that is not read within `patience` fails the
    /// forks that wait for it.
    pub fn start(patience: Duration, events: impl FnMut(Event) + Send + 'static) -> Result<Self, Error> {
        let poll = mio::Poll::new().map_err(Error::Start)?;
        let waker = Arc::new(mio::Waker::new(poll.registry(), server::WAKER).map_err(Error::Start)?);
        let (commands, received) = channel::unbounded();
        let counters = Arc::new(Counters::default());
        let (theirs, events) = (Arc::clone(&counters), Box::new(events));
        let server = server::Server::new(poll, Arc::clone(&waker), received, theirs, events, patience);
        let thread = thread::Builder::new()
            .name("pager".into())
            .spawn(move || server::run(server))
            .map_err(Error::Start)?;
        Ok(Self { commands, waker, counters, forks: Mutex::default(), thread: Some(thread) })
    }

    /// Serves the faults of a fork on its private mapping `[base, base + len)` of the backing's image. Call
    /// [`Pager::remove_fork`] when its process is dead.
    ///
    /// # Panics
    /// When the number is in use.
    pub fn add_fork(
        &self,
        fork: ForkId,
        backing: &Arc<Backing>,
        uffd: OwnedFd,
        base: u64,
        len: u64,
    ) -> Result<(), Error> {
        if !backing.is_lazy() {
            return Err(Error::Eager);
        }
        let expected = backing.image().len();
        if len != expected || !base.is_multiple_of(PAGE) || base.checked_add(len).is_none() {
            return Err(Error::Mapping { base, len, expected });
        }
        let uffd = Uffd::from_fd(uffd).map_err(Error::Descriptor)?;
        let is_new = self.forks.lock().expect("no panic under this lock").insert(fork);
        assert!(is_new, "fork numbers are used once");
        self.send(Command::AddFork(Served::new(fork, Arc::clone(backing), uffd, base)))
    }

    /// Forgets a fork whose process is dead; unknown numbers are fine.
    pub fn remove_fork(&self, fork: ForkId) {
        if self.forks.lock().expect("no panic under this lock").remove(&fork) {
            // A stopped pager has forgotten it already.
            let _ = self.send(Command::RemoveFork(fork));
        }
    }

    /// Makes ready what the first fork of an image that is not there would have to wait for.
    pub fn warm(&self) -> Result<(), Error> {
        self.send(Command::Warm)
    }

    /// Reads what forks touch before their acknowledgement into memory before they ask for it, ahead of all loads, if it is known. What
    /// cannot be read is left to whoever needs it.
    pub fn prefetch(&self, backing: &Arc<Backing>) -> Result<(), Error> {
        let pieces = backing.urgent_pieces()?;
        if pieces.is_empty() { Ok(()) } else { self.send(Command::Prefetch(Arc::clone(backing), pieces)) }
    }

    /// Reads what forks touch next, once for each image: the first of them has acknowledged, and is not to be held up any more.
    pub fn read_on(&self, backing: &Arc<Backing>) -> Result<(), Error> {
        let pieces = backing.take_later_pieces();
        if pieces.is_empty() { Ok(()) } else { self.send(Command::ReadOn(Arc::clone(backing), pieces)) }
    }

    /// Loads all of an image and calls `done` on the pager's thread: in the background, between faults, if forks may use it
    /// meanwhile. [`Backing::residency`] shows the progress.
    pub fn load_all(
        &self,
        backing: &Arc<Backing>,
        done: impl FnOnce(Result<(), Failure>) + Send + 'static,
    ) -> Result<(), Error> {
        self.send(Command::Load(Arc::clone(backing), Box::new(done)))
    }

    /// Ends the loads and the prefetch of an image. Its forks are served as before.
    pub fn abandon(&self, backing: &Arc<Backing>) {
        // A stopped pager loads nothing.
        let _ = self.send(Command::Abandon(Arc::clone(backing)));
    }

    /// Counters since the start.
    pub fn stats(&self) -> Stats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            faults: get(&self.counters.faults),
            late_faults: get(&self.counters.late_faults),
            chunks_read: get(&self.counters.chunks_read),
            zero_faults: get(&self.counters.zero_faults),
            foreign_pages: get(&self.counters.foreign_pages),
            failures: get(&self.counters.failures),
        }
    }

    fn send(&self, command: Command) -> Result<(), Error> {
        self.commands.send(command).map_err(|_| Error::Stopped)?;
        self.waker.wake().map_err(Error::Faults)
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        let _ = self.send(Command::Stop);
        let Some(thread) = self.thread.take() else { return };
        // A callback may hold the last handle; a thread cannot wait for itself.
        if thread.thread().id() != thread::current().id() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests;
