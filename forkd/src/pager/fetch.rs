//! Threads that read and unpack chunks, so that the pager's own thread never waits for a disk.
//!
//! Three lanes: chunks that a fork waits for, batches that one will want soon, and the rest of an image. The first two
//! are served by prompt threads in this order; the rest has one thread of the lowest priority for itself. Threads are started
//! when there is work for them: a daemon that never loads anything has none.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Instant;

use crossbeam::channel;
use forkling_vmm::snapshot::{AlignedChunk, ChunkReader};

use super::backing::Piece;
use super::{Backing, Error};

/// Most prompt threads, when some of them wait for a disk that does not answer.
const MAX_PROMPT: usize = 16;

/// Priority of the thread for the rest of images: that of work which yields to everything.
const NICE: i32 = 19;

/// Stack of each thread in bytes; buffers are on the heap.
const STACK: usize = 256 << 10;

/// Buffers kept for reuse, 64 KiB each.
const SPARE_BUFFERS: usize = 8;

/// Why a piece is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    /// A fork waits for it.
    Fault,
    /// A fork will want it soon.
    Batch,
    /// Nobody waits for it.
    Rest,
}

/// A piece to read.
pub(super) struct Job {
    pub backing: Arc<Backing>,
    pub piece: Piece,
    pub lane: Lane,
    /// By a thread, or by who replaced it.
    taken: AtomicBool,
}

impl Job {
    pub fn new(backing: Arc<Backing>, piece: Piece, lane: Lane) -> Arc<Self> {
        Arc::new(Self { backing, piece, lane, taken: AtomicBool::new(false) })
    }

    /// Whether the caller is the first to take it.
    pub fn take(&self) -> bool {
        !self.taken.swap(true, Ordering::AcqRel)
    }

    pub fn is_taken(&self) -> bool {
        self.taken.load(Ordering::Acquire)
    }
}

/// A piece that was read, or not.
pub(super) struct Fetched {
    pub job: Arc<Job>,
    pub outcome: Result<AlignedChunk, Error>,
}

#[derive(Default)]
struct Queue {
    faults: VecDeque<Arc<Job>>,
    batch: VecDeque<Arc<Job>>,
    rest: VecDeque<Arc<Job>>,
    spare: Vec<AlignedChunk>,
    /// Prompt threads that wait for work.
    idle: usize,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    prompt: Condvar,
    rest: Condvar,
    results: channel::Sender<Fetched>,
    waker: Arc<mio::Waker>,
}

/// The threads and their queue, in the hands of the pager. Dropped, the threads end after what they are at.
pub(super) struct Fetchers {
    shared: Arc<Shared>,
    prompt: usize,
    most_prompt: usize,
    has_rest: bool,
}

impl Fetchers {
    /// Results go to `results`, each followed by a wake-up.
    pub fn new(results: channel::Sender<Fetched>, waker: Arc<mio::Waker>) -> Self {
        let shared =
            Shared { queue: Mutex::default(), prompt: Condvar::new(), rest: Condvar::new(), results, waker };
        // One that waits for a slow file must not be the only one.
        let most_prompt = thread::available_parallelism().map_or(2, usize::from).clamp(2, 4);
        Self { shared: Arc::new(shared), prompt: 0, most_prompt, has_rest: false }
    }

    /// Most prompt threads while none is stuck.
    pub fn threads(&self) -> usize {
        self.most_prompt
    }

    /// Starts a prompt thread and makes a buffer for it, so that the first fork that waits does not wait for these, too.
    pub fn warm(&mut self) {
        if self.prompt == 0 && self.start_prompt().is_ok() {
            self.recycle(AlignedChunk::zeroed());
        }
    }

    /// Hands a job to the threads of its lane. On an error it is not in the queue.
    pub fn push(&mut self, job: Arc<Job>) -> Result<(), Error> {
        if job.lane == Lane::Rest {
            self.start_rest()?;
        } else if self.shared.lock().has_too_few_idle() {
            self.start_prompt()?;
        }
        let (mut queue, lane) = (self.shared.lock(), job.lane);
        match lane {
            Lane::Fault => queue.faults.push_back(job),
            Lane::Batch => queue.batch.push_back(job),
            Lane::Rest => queue.rest.push_back(job),
        }
        drop(queue);
        if lane == Lane::Rest {
            self.shared.rest.notify_one()
        } else {
            self.shared.prompt.notify_one()
        }
        Ok(())
    }

    /// Allows for one more prompt thread: those there are do not come back.
    pub fn grow(&mut self) -> Result<(), Error> {
        self.most_prompt = (self.most_prompt + 1).min(MAX_PROMPT);
        self.start_prompt()
    }

    /// Takes a buffer back.
    pub fn recycle(&self, buffer: AlignedChunk) {
        let mut queue = self.shared.lock();
        if queue.spare.len() < SPARE_BUFFERS {
            queue.spare.push(buffer);
        }
    }

    fn start_prompt(&mut self) -> Result<(), Error> {
        if self.prompt == self.most_prompt {
            return Ok(());
        }
        match self.start("pager-fetch", Shared::next_prompt, None) {
            // Those there are do its work.
            Err(error) if self.prompt > 0 => tracing::warn!(%error, "no further thread for the pager"),
            result => {
                result?;
                self.prompt += 1;
            }
        }
        Ok(())
    }

    fn start_rest(&mut self) -> Result<(), Error> {
        if !self.has_rest {
            self.start("pager-rest", Shared::next_rest, Some(NICE))?;
            self.has_rest = true;
        }
        Ok(())
    }

    fn start(&self, name: &str, next: Next, nice: Option<i32>) -> Result<(), Error> {
        let shared = Arc::clone(&self.shared);
        let reader = ChunkReader::new()?;
        let started = thread::Builder::new().name(name.into()).stack_size(STACK).spawn(move || {
            if let Some(nice) = nice
                // On Linux the priority is that of the calling thread (setpriority(2)).
                && let Err(error) = rustix::process::setpriority_process(None, nice)
            {
                tracing::debug!(%error, "images are completed at normal priority");
            }
            shared.work(reader, next);
        });
        started.map(drop).map_err(Error::Start)
    }
}

impl Drop for Fetchers {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.prompt.notify_all();
        self.shared.rest.notify_all();
    }
}

type Next = fn(&Shared) -> Option<(Arc<Job>, AlignedChunk)>;

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().expect("no panic under this lock")
    }

    fn work(&self, mut reader: ChunkReader, next: Next) {
        while let Some((job, mut buffer)) = next(self) {
            let began = Instant::now();
            let read = job.backing.read(job.piece, &mut reader, &mut buffer);
            job.backing.note_fetch(began.elapsed());
            let outcome = read.map(|()| buffer).map_err(Error::from);
            // Fails when the pager has ended, and then nobody waits.
            if self.results.send(Fetched { job, outcome }).is_err() || self.waker.wake().is_err() {
                return;
            }
        }
    }

    /// The next job for a prompt thread; waits for one. `None` to end.
    fn next_prompt(&self) -> Option<(Arc<Job>, AlignedChunk)> {
        let mut queue = self.lock();
        loop {
            while let Some(job) = queue.faults.pop_front().or_else(|| queue.batch.pop_front()) {
                if job.take() {
                    return Some((job, queue.buffer()));
                }
            }
            if queue.closed {
                return None;
            }
            queue.idle += 1;
            queue = self.prompt.wait(queue).expect("no panic under this lock");
            queue.idle -= 1;
        }
    }

    /// The next job for the thread of the rest.
    fn next_rest(&self) -> Option<(Arc<Job>, AlignedChunk)> {
        let mut queue = self.lock();
        loop {
            while let Some(job) = queue.rest.pop_front() {
                if job.take() {
                    return Some((job, queue.buffer()));
                }
            }
            if queue.closed {
                return None;
            }
            queue = self.rest.wait(queue).expect("no panic under this lock");
        }
    }
}

impl Queue {
    /// Whether one more job would have to wait for a thread.
    fn has_too_few_idle(&self) -> bool {
        self.faults.len() + self.batch.len() >= self.idle
    }

    fn buffer(&mut self) -> AlignedChunk {
        self.spare.pop().unwrap_or_else(AlignedChunk::zeroed)
    }
}
