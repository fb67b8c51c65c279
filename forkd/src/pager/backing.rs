//! An image and the snapshot it is filled from.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use forkling_vmm::memory::image::{self, Filling, Image};
use forkling_vmm::snapshot::{ChunkBuffer, Snapshot};

use super::Error;
use super::fetch::Lane;

/// A template's memory in part in memory, in part on disk. Kept alive by its users and the pager's forks.
pub struct Backing {
    snapshot: Snapshot,
    image: Image,
    data_chunks: u64,
    /// Chunks with data that are in memory.
    loaded: AtomicU64,
    faults: AtomicU64,
    zero_faults: AtomicU64,
    prefetched: AtomicU64,
    fetched_ns: AtomicU64,
}

/// How much of a template is in memory, and how it came there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Residency {
    /// Chunks with data that are in memory.
    pub loaded_chunks: u64,
    /// Chunks with data.
    pub data_chunks: u64,
    /// Bytes of host memory the image takes.
    pub resident_bytes: u64,
    /// Chunks a fork had to wait for.
    pub demand_faults: u64,
    /// Faults on memory that is zero: answered without taking any.
    pub zero_faults: u64,
    /// Chunks read ahead because of the recorded working set.
    pub prefetched_chunks: u64,
    /// Time spent reading, unpacking and verifying, over all threads.
    pub fetch_time: Duration,
}

/// Where a chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Nowhere: it is all zeros.
    Zero,
    /// On disk.
    Disk,
    /// On its way.
    Loading,
    /// In memory.
    Memory,
}

impl Backing {
    /// An empty image for the snapshot, to be filled lazily if this process can (see [`Image::new`]).
    pub fn new(snapshot: Snapshot) -> Result<Self, image::Error> {
        let image = Image::new(snapshot.manifest().memory_bytes)?;
        Ok(Self::with_image(snapshot, image))
    }

    /// An empty image for the snapshot, to be filled before the first fork.
    pub fn eager(snapshot: Snapshot) -> Result<Self, image::Error> {
        let image = Image::eager(snapshot.manifest().memory_bytes)?;
        Ok(Self::with_image(snapshot, image))
    }

    fn with_image(snapshot: Snapshot, image: Image) -> Self {
        let data_chunks = snapshot.index().data_chunks();
        let (loaded, faults, zero_faults, prefetched, fetched_ns) = Default::default();
        Self { snapshot, image, data_chunks, loaded, faults, zero_faults, prefetched, fetched_ns }
    }

    /// The snapshot.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The image; its [`Image::reader`] goes to zygotes.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// The read-only descriptor of the image.
    pub fn reader(&self) -> BorrowedFd<'_> {
        self.image.reader()
    }

    /// True when all data is in memory. What is missing then are zeros, which the kernel supplies by itself: new forks
    /// need no userfaultfd.
    pub fn is_complete(&self) -> bool {
        self.loaded.load(Ordering::Acquire) == self.data_chunks
    }

    /// How much is in memory.
    pub fn residency(&self) -> std::io::Result<Residency> {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Ok(Residency {
            loaded_chunks: self.loaded.load(Ordering::Acquire),
            data_chunks: self.data_chunks,
            resident_bytes: self.image.resident_bytes()?,
            demand_faults: get(&self.faults),
            zero_faults: get(&self.zero_faults),
            prefetched_chunks: get(&self.prefetched),
            fetch_time: Duration::from_nanos(get(&self.fetched_ns)),
        })
    }

    pub(super) fn is_lazy(&self) -> bool {
        self.image.filling() == Filling::Lazy
    }

    /// Number of chunks.
    pub(super) fn chunks(&self) -> u64 {
        self.image.chunks()
    }

    /// Where a chunk is. Panics past the end.
    pub(super) fn place(&self, chunk: u64) -> Place {
        match self.image.residency(chunk) {
            image::Residency::Ready => Place::Memory,
            image::Residency::Loading => Place::Loading,
            image::Residency::Empty if self.snapshot.index().get(chunk).is_some() => Place::Disk,
            image::Residency::Empty => Place::Zero,
        }
    }

    /// Takes charge of a chunk on disk. The pager's thread is the only one that does, so it cannot be too late.
    pub(super) fn claim(&self, chunk: u64) {
        let before = self.image.claim(chunk);
        assert_eq!(before, image::Residency::Empty, "only chunks on disk are fetched");
    }

    /// Gives up the charge of a chunk that could not be read.
    pub(super) fn release(&self, chunk: u64) {
        self.image.release(chunk);
    }

    /// Puts a claimed chunk into memory. Returns the number of pages that somebody else had put there.
    pub(super) fn insert(&self, chunk: u64, contents: &ChunkBuffer, lane: Lane) -> Result<usize, Error> {
        let foreign = self.image.insert(chunk, contents)?;
        if lane == Lane::Batch && self.is_lazy() {
            self.prefetched.fetch_add(1, Ordering::Relaxed);
        }
        self.loaded.fetch_add(1, Ordering::AcqRel);
        Ok(foreign)
    }

    pub(super) fn note_fault(&self, place: Place) {
        let counter = if place == Place::Zero { &self.zero_faults } else { &self.faults };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn note_fetch(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.fetched_ns.fetch_add(nanos, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Backing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backing")
            .field("image", &self.image)
            .field("data_chunks", &self.data_chunks)
            .field("loaded", &self.loaded)
            .finish_non_exhaustive()
    }
}
