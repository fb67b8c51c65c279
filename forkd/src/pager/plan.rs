//! What is to be read although no fork waits for it: batches first, then the rest of images.

use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkling_vmm::protocol::Failure;

use super::backing::Piece;
use super::fetch::Lane;
use super::{Backing, Done, Error};

/// Chunks of the rest at a time.
const REST_DEPTH: usize = 2;

/// How long no fork must have waited for a chunk before the rest is loaded.
const QUIET: Duration = Duration::from_millis(10);

/// How long the rest waits for that quiet at most.
const MOST_PATIENT: Duration = Duration::from_secs(1);

/// What forks will want.
struct Batch {
    backing: Arc<Backing>,
    pieces: VecDeque<Piece>,
}

impl Batch {
    fn new(backing: Arc<Backing>, pieces: Vec<Piece>) -> Self {
        Self { backing, pieces: pieces.into() }
    }

    /// The next piece that is not there and not on its way.
    fn next(
        &mut self,
        is_under_way: &impl Fn(&Arc<Backing>, Piece) -> bool,
    ) -> Option<(Arc<Backing>, Piece)> {
        let Self { backing, pieces } = self;
        let is_wanted = |piece: &Piece| match *piece {
            Piece::Chunk(chunk) => backing.is_on_disk(chunk),
            Piece::Segment(_) => backing.has_gaps(*piece) && !is_under_way(backing, *piece),
        };
        let piece = std::iter::from_fn(|| pieces.pop_front()).find(is_wanted)?;
        Some((Arc::clone(backing), piece))
    }
}

/// An image that is being loaded completely.
struct Load {
    backing: Arc<Backing>,
    /// All chunks before this one are in memory, zero or on their way.
    next: u64,
    begun: Instant,
    done: Done,
}

/// What is to be read when nobody waits.
pub(super) struct Plan {
    /// Most pieces of batches in the threads' queue.
    batch_depth: usize,
    batches: VecDeque<Batch>,
    /// As batches, when there is time.
    later: VecDeque<Batch>,
    loads: VecDeque<Load>,
    batch_jobs: usize,
    rest_jobs: usize,
    last_fault: Option<Instant>,
}

impl Plan {
    /// For so many threads: two pieces for each are enough that none is idle, and few enough that a fault does not wait. Each piece
    /// takes a buffer.
    pub fn new(threads: usize) -> Self {
        let (batches, later, loads, batch_jobs, rest_jobs, last_fault) = Default::default();
        Self { batch_depth: 2 * threads, batches, later, loads, batch_jobs, rest_jobs, last_fault }
    }

    pub fn add_batch(&mut self, backing: Arc<Backing>, pieces: Vec<Piece>) {
        self.batches.push_back(Batch::new(backing, pieces));
    }

    /// As [`Plan::add_batch`], at the lowest priority: after all batches, ahead of the rest of images.
    pub fn add_later(&mut self, backing: Arc<Backing>, pieces: Vec<Piece>) {
        if !pieces.is_empty() {
            self.later.push_back(Batch::new(backing, pieces));
        }
    }

    pub fn add_load(&mut self, backing: Arc<Backing>, done: Done) {
        if backing.is_complete() {
            return done(Ok(()));
        }
        if backing.is_lazy() {
            self.loads.push_back(Load { backing, next: 0, begun: Instant::now(), done });
        } else {
            // Somebody waits for an image that cannot be used before it is complete.
            let all = (0..backing.chunks()).filter(|&chunk| backing.is_on_disk(chunk));
            self.add_batch(Arc::clone(&backing), all.map(Piece::Chunk).collect());
            let next = backing.chunks();
            self.loads.push_back(Load { backing, next, begun: Instant::now(), done });
        }
    }

    /// A fork has to wait for a chunk.
    pub fn note_fault(&mut self) {
        self.last_fault = Some(Instant::now());
    }

    /// A job has come back.
    pub fn note_fetched(&mut self, lane: Lane) {
        match lane {
            Lane::Fault => {}
            Lane::Batch => self.batch_jobs -= 1,
            Lane::Rest => self.rest_jobs -= 1,
        }
    }

    /// The next piece to read ahead; `None` when there is enough under way. `is_under_way` says so of a segment. Each is
    /// counted until [`Plan::note_fetched`].
    pub fn next(
        &mut self,
        is_under_way: impl Fn(&Arc<Backing>, Piece) -> bool,
    ) -> Option<(Arc<Backing>, Piece, Lane)> {
        if self.batch_jobs < self.batch_depth
            && let Some((backing, piece)) = next_of(&mut self.batches, &is_under_way)
        {
            self.batch_jobs += 1;
            return Some((backing, piece, Lane::Batch));
        }
        if self.rest_jobs < REST_DEPTH && self.rest_begins_in() == Some(Duration::ZERO) {
            let next = match next_of(&mut self.later, &is_under_way) {
                // There may have been nothing left to do in them.
                None if self.rest_begins_in() != Some(Duration::ZERO) => None,
                None => self.next_of_loads().map(|(backing, chunk)| (backing, Piece::Chunk(chunk))),
                later => later,
            };
            let (backing, piece) = next?;
            self.rest_jobs += 1;
            return Some((backing, piece, Lane::Rest));
        }
        None
    }

    fn next_of_loads(&mut self) -> Option<(Arc<Backing>, u64)> {
        self.loads.iter_mut().find_map(|load| {
            let chunk = (load.next..load.backing.chunks()).find(|&chunk| load.backing.is_on_disk(chunk));
            load.next = chunk.map_or(load.backing.chunks(), |chunk| chunk + 1);
            chunk.map(|chunk| (Arc::clone(&load.backing), chunk))
        })
    }

    /// When more of the rest may be read; `None` when nothing is left, or enough under way.
    pub fn rest_begins_in(&self) -> Option<Duration> {
        if self.rest_jobs >= REST_DEPTH || !self.batches.is_empty() {
            return None;
        }
        // Little, and soon wanted.
        if !self.later.is_empty() {
            return Some(Duration::ZERO);
        }
        let begun =
            self.loads.iter().find(|load| load.next < load.backing.chunks()).map(|load| load.begun)?;
        // It begins with a fork, which is about to have its first faults.
        let quiet = self.last_fault.map_or(begun, |fault| fault.max(begun)) + QUIET;
        let from = quiet.min(begun + MOST_PATIENT);
        Some(from.saturating_duration_since(Instant::now()))
    }

    /// Tells who waits for the image, if it is complete.
    pub fn finish(&mut self, backing: &Arc<Backing>) {
        if !self.loads.is_empty() && backing.is_complete() {
            self.end(backing, || Ok(()));
        }
    }

    /// Ends the loads of an image of which a chunk cannot be had.
    pub fn fail(&mut self, backing: &Arc<Backing>, error: &Error) {
        for batches in [&mut self.batches, &mut self.later] {
            batches.retain(|batch| !Arc::ptr_eq(&batch.backing, backing));
        }
        self.end(backing, || Err(error.failure()));
    }

    /// Reads no further ahead for an image.
    pub fn abandon(&mut self, backing: &Arc<Backing>) {
        self.fail(backing, &Error::Abandoned);
    }

    /// As [`Plan::abandon`], for all.
    pub fn abandon_all(&mut self) {
        self.batches.clear();
        self.later.clear();
        for load in self.loads.drain(..) {
            (load.done)(Err(Error::Abandoned.failure()));
        }
    }

    fn end(&mut self, backing: &Arc<Backing>, outcome: impl Fn() -> Result<(), Failure>) {
        let (ended, going): (VecDeque<_>, _) =
            mem::take(&mut self.loads).into_iter().partition(|load| Arc::ptr_eq(&load.backing, backing));
        self.loads = going;
        for load in ended {
            (load.done)(outcome());
        }
    }
}

/// The next piece of the first batch that has one; those that have none are done.
fn next_of(
    batches: &mut VecDeque<Batch>,
    is_under_way: &impl Fn(&Arc<Backing>, Piece) -> bool,
) -> Option<(Arc<Backing>, Piece)> {
    while let Some(batch) = batches.front_mut() {
        if let Some(next) = batch.next(is_under_way) {
            return Some(next);
        }
        batches.pop_front();
    }
    None
}
