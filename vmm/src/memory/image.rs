//! The image: a template's memory, one sparse memfd that all its forks map privately.
//!
//! It is filled chunk by chunk by the pager, which alone can write to it. Forks get a read-only descriptor. A chunk is
//! never taken out again; an image goes away as a whole when its last user does.

mod draft;

use std::alloc::Layout;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use memmap2::{MmapMut, MmapOptions};
use rustix::fs::SeekFrom;

use super::layout::{MIB, PAGE};
use crate::sys::memfd::SealedMemory;
use crate::sys::uffd::{Inserter, Scope, Uffd};
pub use draft::Draft;

/// Size of a chunk, the unit in which images are stored and filled, in bytes.
pub const CHUNK: usize = 64 * 1024;

/// Pages in a chunk.
const CHUNK_PAGES: u64 = CHUNK as u64 / PAGE;

/// Contents of one chunk.
pub type ChunkBuffer = [u8; CHUNK];

/// Room for one chunk, aligned to pages so that a file can be read into it past the page cache.
#[derive(Debug)]
pub struct AlignedChunk(MmapMut);

impl AlignedChunk {
    /// Zeros, as the kernel gives them: nothing is written before something is read into it. Without memory for it the process
    /// ends, as by any allocation.
    #[must_use]
    pub fn zeroed() -> Self {
        let mapped = MmapOptions::new().len(CHUNK).populate().map_anon();
        Self(mapped.unwrap_or_else(|_| std::alloc::handle_alloc_error(Layout::new::<ChunkBuffer>())))
    }
}

impl Deref for AlignedChunk {
    type Target = ChunkBuffer;

    fn deref(&self) -> &ChunkBuffer {
        self.0[..].try_into().expect("it has the length of a chunk")
    }
}

impl DerefMut for AlignedChunk {
    fn deref_mut(&mut self) -> &mut ChunkBuffer {
        (&mut self.0[..]).try_into().expect("it has the length of a chunk")
    }
}

/// Why an image cannot be made or filled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No memory, no memfd, no descriptors.
    #[error("cannot create an image of {len} bytes: {source}; check memory and the limits on open files")]
    Create {
        /// Length asked for.
        len: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A chunk could not be inserted.
    #[error(
        "cannot insert chunk {chunk} into the image: {source}; check the host's memory and the cgroup's limit"
    )]
    Insert {
        /// Number of the chunk.
        chunk: u64,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel has no userfaultfd for this process.
    #[error(
        "userfaultfd is not available: {0}; allow access to /dev/userfaultfd, or templates are loaded whole"
    )]
    NoUserfaultfd(io::Error),
    /// Inserting one page made another amount of memory appear.
    #[error(
        "inserting one page into shared memory allocated {allocated} bytes at {start:#x}; \
         set /sys/kernel/mm/transparent_hugepage/shmem_enabled to never"
    )]
    NotAtomic {
        /// Bytes that appeared.
        allocated: u64,
        /// Where.
        start: u64,
    },
}

/// How far a chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Residency {
    /// Not in memory.
    Empty = 0,
    /// Someone fetches it.
    Loading = 1,
    /// In memory.
    Ready = 2,
}

/// How pages get into an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filling {
    /// Atomically, while forks use it.
    Lazy,
    /// By plain writes, all of it before the first fork: where userfaultfd is not available.
    Eager,
}

/// A template's memory.
#[derive(Debug)]
pub struct Image {
    filler: Filler,
    chunks: Vec<AtomicU8>,
    /// For each chunk, which of its pages were inserted by themselves.
    pages: Vec<AtomicU16>,
    ready: AtomicU64,
}

#[derive(Debug)]
enum Filler {
    Atomic(Inserter),
    Plain(SealedMemory),
}

impl Image {
    /// An empty image of `len` bytes, a multiple of [`CHUNK`]; filled lazily if this process can.
    pub fn new(len: u64) -> Result<Self, Error> {
        Ok(Self::over(Self::memory(len)?))
    }

    fn over(memory: SealedMemory) -> Self {
        Self::with_filler(match Inserter::new(memory) {
            Ok(inserter) => Filler::Atomic(inserter),
            Err((memory, _)) => Filler::Plain(memory),
        })
    }

    /// An empty image that must be filled before the first fork.
    pub fn eager(len: u64) -> Result<Self, Error> {
        Ok(Self::with_filler(Filler::Plain(Self::memory(len)?)))
    }

    fn memory(len: u64) -> Result<SealedMemory, Error> {
        Draft::new(len)?.seal()
    }

    fn with_filler(filler: Filler) -> Self {
        let count = filler.memory().len() / CHUNK as u64;
        let chunks = (0..count).map(|_| AtomicU8::new(Residency::Empty as u8)).collect();
        let pages = (0..count).map(|_| AtomicU16::new(0)).collect();
        Self { filler, chunks, pages, ready: AtomicU64::new(0) }
    }

    /// How it can be filled.
    pub fn filling(&self) -> Filling {
        match self.filler {
            Filler::Atomic(_) => Filling::Lazy,
            Filler::Plain(_) => Filling::Eager,
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.filler.memory().len()
    }

    /// Whether it has no bytes; never so.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of chunks.
    pub fn chunks(&self) -> u64 {
        self.chunks.len() as u64
    }

    /// Number of chunks in memory.
    pub fn ready_chunks(&self) -> u64 {
        self.ready.load(Ordering::Acquire)
    }

    /// Bytes of memory it takes on this host.
    pub fn resident_bytes(&self) -> io::Result<u64> {
        self.filler.memory().allocated_bytes()
    }

    /// The read-only descriptor for zygotes and forks.
    pub fn reader(&self) -> BorrowedFd<'_> {
        self.filler.memory().reader()
    }

    /// How far a chunk is. Panics past the end.
    pub fn residency(&self, chunk: u64) -> Residency {
        match self.state(chunk).load(Ordering::Acquire) {
            0 => Residency::Empty,
            1 => Residency::Loading,
            _ => Residency::Ready,
        }
    }

    /// Asks to fetch a chunk. [`Residency::Empty`] means that the caller now has to [`Image::insert`] or
    /// [`Image::release`] it; otherwise someone else has it, or it is there. Panics past the end.
    pub fn claim(&self, chunk: u64) -> Residency {
        let (empty, loading) = (Residency::Empty as u8, Residency::Loading as u8);
        match self.state(chunk).compare_exchange(empty, loading, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Residency::Empty,
            Err(state) if state == loading => Residency::Loading,
            Err(_) => Residency::Ready,
        }
    }

    /// Gives up a claim.
    pub fn release(&self, chunk: u64) {
        self.state(chunk).store(Residency::Empty as u8, Ordering::Release);
    }

    /// Fills a claimed chunk; its pages appear one by one, each complete. Returns the number of pages that were in
    /// memory although nobody had inserted them, which only a fork that reads past its userfaultfd can bring about;
    /// they have the right contents now. On an error the claim is given up. Chunks of zeros are left out: their holes
    /// read as zeros, and who must not see a hole gets [`Uffd::zero`].
    pub fn insert(&self, chunk: u64, contents: &ChunkBuffer) -> Result<usize, Error> {
        assert_eq!(self.residency(chunk), Residency::Loading, "a chunk is claimed before it is inserted");
        let offset = chunk * CHUNK as u64;
        let inserted = match &self.filler {
            Filler::Atomic(inserter) => self.insert_missing(inserter, chunk, contents),
            Filler::Plain(memory) => {
                memory.write(offset, contents);
                Ok(0)
            }
        };
        match inserted {
            Ok(existing) => {
                self.state(chunk).store(Residency::Ready as u8, Ordering::Release);
                self.ready.fetch_add(1, Ordering::AcqRel);
                Ok(existing)
            }
            Err(source) => {
                self.release(chunk);
                Err(Error::Insert { chunk, source })
            }
        }
    }

    /// Whether a page was inserted, with its chunk or by itself. Panics past the end.
    pub fn has_page(&self, page: u64) -> bool {
        let (chunk, bit) = (page / CHUNK_PAGES, page % CHUNK_PAGES);
        self.residency(chunk) == Residency::Ready
            || self.mask(chunk).load(Ordering::Acquire) & (1 << bit) != 0
    }

    /// Inserts single pages of a lazy image, each complete at once: page `pages[n]` from the nth 4 KiB of `contents`. What is
    /// there already is left alone. Returns as [`Image::insert`]; chunks are no nearer to being ready. Called by one
    /// thread at a time, the one that inserts chunks.
    ///
    /// # Panics
    /// When a page is past the end, there are more than 16, or the image is not lazy.
    pub fn insert_pages(&self, pages: &[u32], contents: &ChunkBuffer) -> Result<usize, Error> {
        let Filler::Atomic(inserter) = &self.filler else { panic!("only lazy images are filled by pages") };
        let (mut at, mut foreign) = (0, 0);
        // Neighbours go in together.
        for run in pages.chunk_by(|&a, &b| b == a + 1 && self.has_page(a.into()) == self.has_page(b.into())) {
            let (first, bytes) = (u64::from(run[0]), run.len() * PAGE as usize);
            let contents = &contents[at..at + bytes];
            at += bytes;
            if self.has_page(first) {
                continue;
            }
            let chunk = first / CHUNK_PAGES;
            let inserted = inserter.insert(first * PAGE, contents);
            foreign += inserted.map_err(|source| Error::Insert { chunk, source })?;
            run.iter().for_each(|&page| self.note_page(page.into()));
        }
        Ok(foreign)
    }

    /// Inserts the pages of a chunk that are not there.
    fn insert_missing(&self, inserter: &Inserter, chunk: u64, contents: &ChunkBuffer) -> io::Result<usize> {
        let (mask, start) = (self.mask(chunk).load(Ordering::Acquire), chunk * CHUNK as u64);
        if mask == 0 {
            return inserter.insert(start, contents);
        }
        let is_there = |page: u64| mask & (1 << page) != 0;
        let (mut page, mut foreign) = (0, 0);
        while page < CHUNK_PAGES {
            let end =
                (page..CHUNK_PAGES).find(|&other| is_there(other) != is_there(page)).unwrap_or(CHUNK_PAGES);
            if !is_there(page) {
                let bytes = (page * PAGE) as usize..(end * PAGE) as usize;
                foreign += inserter.insert(start + page * PAGE, &contents[bytes])?;
            }
            page = end;
        }
        Ok(foreign)
    }

    fn note_page(&self, page: u64) {
        self.mask(page / CHUNK_PAGES).fetch_or(1 << (page % CHUNK_PAGES), Ordering::AcqRel);
    }

    fn mask(&self, chunk: u64) -> &AtomicU16 {
        &self.pages[usize::try_from(chunk).expect("fits the address space")]
    }

    fn state(&self, chunk: u64) -> &AtomicU8 {
        &self.chunks[usize::try_from(chunk).expect("fits the address space")]
    }
}

impl Filler {
    fn memory(&self) -> &SealedMemory {
        match self {
            Self::Atomic(inserter) => inserter.memory(),
            Self::Plain(memory) => memory,
        }
    }
}

/// Shows that images can be filled lazily on this host: a userfaultfd that sees KVM's faults can be had, and an
/// inserted page makes exactly one page appear, with large pages in shared memory or without.
pub fn self_test() -> Result<(), Error> {
    Uffd::new(Scope::UserAndKernel).map_err(Error::NoUserfaultfd)?;
    // Two large pages, and a small one in the middle of the second.
    let len = 4 * MIB;
    let target = 2 * MIB + 5 * PAGE;
    let memory =
        SealedMemory::new("forkling-self-test", len).map_err(|source| Error::Create { len, source })?;
    let inserter = Inserter::new(memory).map_err(|(_, error)| Error::NoUserfaultfd(error))?;
    inserter
        .insert(target, &[0xA5; PAGE as usize])
        .map_err(|source| Error::Insert { chunk: target / CHUNK as u64, source })?;
    let (start, allocated) =
        first_extent(inserter.memory()).map_err(|source| Error::Create { len, source })?;
    if (start, allocated) == (target, PAGE) { Ok(()) } else { Err(Error::NotAtomic { allocated, start }) }
}

/// Start and length of the first allocated range.
fn first_extent(memory: &SealedMemory) -> io::Result<(u64, u64)> {
    let reader = memory.reader();
    let start = rustix::fs::seek(reader.as_fd(), SeekFrom::Data(0))?;
    let end = rustix::fs::seek(reader.as_fd(), SeekFrom::Hole(start))?;
    Ok((start, end - start))
}

#[cfg(test)]
mod tests;
