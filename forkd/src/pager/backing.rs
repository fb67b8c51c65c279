//! An image and the snapshot it is filled from.

use std::sync::atomic::{AtomicU64, Ordering};

use forkling_vmm::memory::image::{self, Contents, Image};
use forkling_vmm::snapshot::{ChunkBuffer, ChunkKind, ChunkReader, Snapshot};

use super::{Counters, Error};

/// A template's memory in part in memory, in part on disk. Kept alive by its users and the pager's forks.
pub struct Backing {
    snapshot: Snapshot,
    image: Image,
    data_chunks: u64,
    /// Chunks with data that are in memory.
    loaded: AtomicU64,
}

/// How much of a template is in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Residency {
    /// Chunks with data that are in memory.
    pub loaded_chunks: u64,
    /// Chunks with data.
    pub data_chunks: u64,
    /// Bytes of host memory the image takes.
    pub resident_bytes: u64,
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
        Self { snapshot, image, data_chunks, loaded: AtomicU64::new(0) }
    }

    /// The snapshot.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The image; its [`Image::reader`] goes to zygotes.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// True when all data is in memory. What is missing then are zeros, which the kernel supplies by itself: new forks
    /// need no userfaultfd.
    pub fn is_complete(&self) -> bool {
        self.loaded.load(Ordering::Acquire) == self.data_chunks
    }

    /// How much is in memory.
    pub fn residency(&self) -> std::io::Result<Residency> {
        Ok(Residency {
            loaded_chunks: self.loaded.load(Ordering::Acquire),
            data_chunks: self.data_chunks,
            resident_bytes: self.image.resident_bytes()?,
        })
    }

    /// Number of chunks.
    pub(super) fn chunks(&self) -> u64 {
        self.image.chunks()
    }

    /// Whether the chunk has to come from disk before the image is complete.
    pub(super) fn is_missing_data(&self, chunk: u64) -> bool {
        self.image.residency(chunk) == image::Residency::Empty && self.snapshot.index().get(chunk).is_some()
    }

    /// Brings a chunk into memory. Returns false when it was there.
    pub(super) fn fetch(
        &self,
        chunk: u64,
        reader: &mut ChunkReader,
        buffer: &mut ChunkBuffer,
        counters: &Counters,
    ) -> Result<bool, Error> {
        match self.image.claim(chunk) {
            image::Residency::Empty => {}
            image::Residency::Ready => return Ok(false),
            image::Residency::Loading => unreachable!("the pager is the only one to fetch, and one thread"),
        }
        let kind = match reader.read(&self.snapshot, chunk, buffer) {
            Ok(kind) => kind,
            Err(error) => {
                self.image.release(chunk);
                return Err(error.into());
            }
        };
        let foreign = match kind {
            ChunkKind::Zero => {
                counters.chunks_zeroed.fetch_add(1, Ordering::Relaxed);
                self.image.insert(chunk, Contents::Zero)?
            }
            ChunkKind::Data => {
                counters.chunks_read.fetch_add(1, Ordering::Relaxed);
                let foreign = self.image.insert(chunk, Contents::Data(buffer))?;
                self.loaded.fetch_add(1, Ordering::AcqRel);
                foreign
            }
        };
        counters.foreign_pages.fetch_add(foreign as u64, Ordering::Relaxed);
        Ok(true)
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
