//! What is to be read although no fork waits for it: batches first, then the rest of images.

use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forkling_vmm::protocol::Failure;

use super::backing::Piece;
use super::fetch::Lane;
use super::{Backing, Done, Error};

/// Chunks of batches in the threads' queue at a time: enough that none is idle, few enough that a fault does not wait.
const BATCH_DEPTH: usize = 8;

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

/// An image that is being loaded completely.
struct Load {
    backing: Arc<Backing>,
    /// All chunks before this one are in memory, zero or on their way.
    next: u64,
    begun: Instant,
    done: Done,
}

/// What is to be read when nobody waits.
#[derive(Default)]
pub(super) struct Plan {
    batches: VecDeque<Batch>,
    loads: VecDeque<Load>,
    batch_jobs: usize,
    rest_jobs: usize,
    last_fault: Option<Instant>,
}

impl Plan {
    pub fn add_batch(&mut self, backing: Arc<Backing>, pieces: Vec<Piece>) {
        self.batches.push_back(Batch { backing, pieces: pieces.into() });
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
        if self.batch_jobs < BATCH_DEPTH
            && let Some((backing, piece)) = self.next_of_batches(is_under_way)
        {
            self.batch_jobs += 1;
            return Some((backing, piece, Lane::Batch));
        }
        if self.rest_jobs < REST_DEPTH && self.rest_begins_in() == Some(Duration::ZERO) {
            let (backing, chunk) = self.next_of_loads()?;
            self.rest_jobs += 1;
            return Some((backing, Piece::Chunk(chunk), Lane::Rest));
        }
        None
    }

    fn next_of_batches(
        &mut self,
        is_under_way: impl Fn(&Arc<Backing>, Piece) -> bool,
    ) -> Option<(Arc<Backing>, Piece)> {
        while let Some(Batch { backing, pieces }) = self.batches.front_mut() {
            while let Some(piece) = pieces.pop_front() {
                let is_wanted = match piece {
                    Piece::Chunk(chunk) => backing.is_on_disk(chunk),
                    Piece::Segment(_) => backing.has_gaps(piece) && !is_under_way(backing, piece),
                };
                if is_wanted {
                    return Some((Arc::clone(backing), piece));
                }
            }
            self.batches.pop_front();
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
        let load = self.loads.iter().find(|load| load.next < load.backing.chunks())?;
        // A load begins with a fork, which is about to have its first faults.
        let quiet = self.last_fault.map_or(load.begun, |fault| fault.max(load.begun)) + QUIET;
        let from = quiet.min(load.begun + MOST_PATIENT);
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
        self.batches.retain(|batch| !Arc::ptr_eq(&batch.backing, backing));
        self.end(backing, || Err(error.failure()));
    }

    /// Reads no further ahead for an image.
    pub fn abandon(&mut self, backing: &Arc<Backing>) {
        self.fail(backing, &Error::Abandoned);
    }

    /// As [`Plan::abandon`], for all.
    pub fn abandon_all(&mut self) {
        self.batches.clear();
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
