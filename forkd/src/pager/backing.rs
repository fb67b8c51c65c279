//! An image and the snapshot it is filled from.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use forkling_vmm::memory::image::{self, Draft, Filling, Image};
use forkling_vmm::protocol::PageRun;
use forkling_vmm::snapshot::packed::SEGMENT_PAGES;
use forkling_vmm::snapshot::{self, AlignedChunk, ChunkBuffer, ChunkReader, PackedPages, Snapshot};

use super::Error;
use super::fetch::Lane;

/// What is read in one go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Piece {
    /// The chunk of this number.
    Chunk(u64),
    /// This segment of the working set's pages.
    Segment(u32),
}

/// The pages of the working set that can be read by themselves.
struct Packed {
    pages: PackedPages,
    /// One could not be read: all is left to the chunks.
    spoilt: AtomicBool,
}

/// A template's memory in part in memory, in part on disk. Kept alive by its users and the pager's forks.
pub struct Backing {
    snapshot: Snapshot,
    image: Image,
    packed: Option<Packed>,
    data_chunks: u64,
    /// Whether what is not urgent of the working set was asked for.
    reads_on: AtomicBool,
    /// Chunks with data that are in memory.
    loaded: AtomicU64,
    faults: AtomicU64,
    zero_faults: AtomicU64,
    prefetched: AtomicU64,
    prefetched_pages: AtomicU64,
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
    /// Single pages read because of the recorded working set.
    pub prefetched_pages: u64,
    /// Time spent reading, unpacking and verifying, over all threads.
    pub fetch_time: Duration,
}

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Nowhere: all its chunk is zeros.
    Zero,
    /// On disk or on its way, in this piece.
    Disk(Piece),
    /// In memory.
    Memory,
}

impl Backing {
    /// An image for the snapshot, to be filled lazily if this process can (see [`Image::new`]). What its first fork cannot go on
    /// without is in it already, if that is known: `pages` are those of the recorded working set.
    pub fn new(snapshot: Snapshot, pages: Option<PackedPages>) -> Result<Self, image::Error> {
        let mut draft = Draft::new(snapshot.manifest().memory_bytes)?;
        let packed = pages.map(|pages| Packed { pages, spoilt: AtomicBool::new(false) });
        let filled = packed.as_ref().map_or(0, |packed| packed.fill(&mut draft));
        let mut backing = Self::with_image(snapshot, draft.finish()?);
        if backing.is_lazy() {
            backing.packed = packed;
            *backing.prefetched_pages.get_mut() = filled;
        }
        Ok(backing)
    }

    /// An empty image for the snapshot, to be filled before the first fork.
    pub fn eager(snapshot: Snapshot) -> Result<Self, image::Error> {
        let image = Image::eager(snapshot.manifest().memory_bytes)?;
        Ok(Self::with_image(snapshot, image))
    }

    fn with_image(snapshot: Snapshot, image: Image) -> Self {
        let data_chunks = snapshot.index().data_chunks();
        let (loaded, faults, zero_faults, prefetched, prefetched_pages, fetched_ns) = Default::default();
        Self {
            snapshot,
            image,
            packed: None,
            data_chunks,
            reads_on: AtomicBool::new(false),
            loaded,
            faults,
            zero_faults,
            prefetched,
            prefetched_pages,
            fetched_ns,
        }
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
            prefetched_pages: get(&self.prefetched_pages),
            fetch_time: Duration::from_nanos(get(&self.fetched_ns)),
        })
    }

    /// What forks are known to write before their acknowledgement, all of it among the pages that are read first.
    pub(super) fn written_first(&self) -> Vec<PageRun> {
        self.packed.as_ref().map(|packed| runs(packed.pages.written())).unwrap_or_default()
    }

    pub(super) fn is_lazy(&self) -> bool {
        self.image.filling() == Filling::Lazy
    }

    /// Number of chunks.
    pub(super) fn chunks(&self) -> u64 {
        self.image.chunks()
    }

    /// Where a page is. Panics past the end.
    pub(super) fn place(&self, page: u64) -> Place {
        let chunk = page / SEGMENT_PAGES as u64;
        if self.image.has_page(page) {
            return Place::Memory;
        }
        if self.snapshot.index().get(chunk).is_none() {
            return Place::Zero;
        }
        let segment = self.usable_pages().and_then(|packed| packed.segment_of(page as u32));
        // A chunk that is on its way brings all of its pages.
        match segment {
            Some(segment) if !self.is_loading(chunk) => Place::Disk(Piece::Segment(segment)),
            _ => Place::Disk(Piece::Chunk(chunk)),
        }
    }

    /// Whether a chunk has to be read and is not on its way. Panics past the end.
    pub(super) fn is_on_disk(&self, chunk: u64) -> bool {
        self.image.residency(chunk) == image::Residency::Empty && self.snapshot.index().get(chunk).is_some()
    }

    fn is_loading(&self, chunk: u64) -> bool {
        self.image.residency(chunk) == image::Residency::Loading
    }

    fn usable_pages(&self) -> Option<&Packed> {
        self.packed.as_ref().filter(|packed| !packed.spoilt.load(Ordering::Relaxed))
    }

    /// What of the working set to read before the first fork, unless it was there from the beginning.
    pub(super) fn urgent_pieces(&self) -> Result<Vec<Piece>, snapshot::Error> {
        if self.packed.is_some() {
            return Ok(Vec::new());
        }
        let set = self.snapshot.working_set()?.unwrap_or_default();
        Ok(set.chunks().into_iter().map(Piece::Chunk).collect())
    }

    /// What to read when the first fork has what is urgent; nothing when it was asked for before.
    pub(super) fn take_later_pieces(&self) -> Vec<Piece> {
        if self.reads_on.swap(true, Ordering::Relaxed) {
            return Vec::new();
        }
        let segments =
            self.usable_pages().map(|Packed { pages, .. }| pages.urgent_segments()..pages.segments());
        segments.into_iter().flatten().map(|segment| Piece::Segment(segment as u32)).collect()
    }

    /// Takes charge of a piece that is not on its way. The pager's thread is the only one that does.
    pub(super) fn claim(&self, piece: Piece) {
        if let Piece::Chunk(chunk) = piece {
            let before = self.image.claim(chunk);
            assert_eq!(before, image::Residency::Empty, "only chunks on disk are fetched");
        }
    }

    /// Gives up the charge of a piece that could not be read.
    pub(super) fn release(&self, piece: Piece) {
        match (piece, &self.packed) {
            (Piece::Chunk(chunk), _) => self.image.release(chunk),
            (Piece::Segment(_), Some(packed)) => packed.spoilt.store(true, Ordering::Relaxed),
            (Piece::Segment(_), None) => {}
        }
    }

    /// Reads and verifies a piece.
    pub(super) fn read(
        &self,
        piece: Piece,
        reader: &mut ChunkReader,
        buffer: &mut ChunkBuffer,
    ) -> Result<(), snapshot::Error> {
        match (piece, &self.packed) {
            (Piece::Chunk(chunk), _) => reader.read(&self.snapshot, chunk, buffer).map(drop),
            (Piece::Segment(segment), Some(packed)) => packed.pages.read(segment as usize, buffer),
            (Piece::Segment(_), None) => unreachable!("segments are of an image that has them"),
        }
    }

    /// Puts a claimed piece into memory. Returns the number of pages that somebody else had put there.
    pub(super) fn insert(&self, piece: Piece, contents: &ChunkBuffer, lane: Lane) -> Result<usize, Error> {
        match piece {
            Piece::Chunk(chunk) => {
                let foreign = self.image.insert(chunk, contents)?;
                if lane == Lane::Batch && self.is_lazy() {
                    self.prefetched.fetch_add(1, Ordering::Relaxed);
                }
                self.loaded.fetch_add(1, Ordering::AcqRel);
                Ok(foreign)
            }
            Piece::Segment(segment) => {
                let pages = self.pages_of(segment);
                let foreign = self.image.insert_pages(pages, contents)?;
                self.prefetched_pages.fetch_add(pages.len() as u64, Ordering::Relaxed);
                Ok(foreign)
            }
        }
    }

    /// Whether a page of a piece is not in memory.
    pub(super) fn has_gaps(&self, piece: Piece) -> bool {
        let has_gap =
            |(first, count): (u64, u64)| (first..first + count).any(|page| !self.image.has_page(page));
        self.runs_of(piece).into_iter().any(has_gap)
    }

    /// The pages in a piece, as runs of a first one and their number.
    pub(super) fn runs_of(&self, piece: Piece) -> Vec<PageRun> {
        match piece {
            Piece::Chunk(chunk) => vec![(chunk * SEGMENT_PAGES as u64, SEGMENT_PAGES as u64)],
            Piece::Segment(segment) => runs(self.pages_of(segment)),
        }
    }

    fn pages_of(&self, segment: u32) -> &[u32] {
        self.packed.as_ref().map_or(&[], |packed| packed.pages.pages_of(segment as usize))
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

impl Packed {
    /// Puts what is urgent into an image; returns the number of pages. What cannot be read is left to the chunks.
    fn fill(&self, draft: &mut Draft) -> u64 {
        self.pages.spare_page_cache();
        let (mut buffer, mut filled) = (AlignedChunk::zeroed(), 0);
        for segment in 0..self.pages.urgent_segments() {
            let pages = self.pages.pages_of(segment);
            let read = self.pages.read(segment, &mut buffer).map_err(Error::from);
            if let Err(error) = read.and_then(|()| Ok(draft.write_pages(pages, &buffer[..])?)) {
                self.spoil(&error);
                break;
            }
            filled += pages.len() as u64;
        }
        filled
    }

    /// Has no more of it read: it holds copies only, and who needs a page is given its chunk.
    fn spoil(&self, error: &Error) {
        tracing::warn!("pages of a recorded working set are of no use: {}", error.failure().message);
        self.spoilt.store(true, Ordering::Relaxed);
    }

    fn segment_of(&self, page: u32) -> Option<u32> {
        self.pages.place(page).map(|place| (place / SEGMENT_PAGES) as u32)
    }
}

fn runs(pages: &[u32]) -> Vec<PageRun> {
    let runs = pages.chunk_by(|&a, &b| b == a + 1);
    runs.map(|run| (run[0].into(), run.len() as u64)).collect()
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
