//! An image before its first user.

use super::{CHUNK, CHUNK_PAGES, Error, Filling, Image};
use crate::memory::layout::PAGE;
use crate::sys::memfd::{MemoryDraft, SealedMemory};

/// An image that nobody has yet. What its first fork is known to need gets in by plain writes, on the thread that reads it.
#[derive(Debug)]
pub struct Draft {
    memory: MemoryDraft,
    len: u64,
    pages: Vec<u32>,
}

impl Draft {
    /// An empty one of `len` bytes, a multiple of [`CHUNK`].
    pub fn new(len: u64) -> Result<Self, Error> {
        assert!(len > 0 && len.is_multiple_of(CHUNK as u64), "an image is a whole number of chunks");
        let memory =
            MemoryDraft::new("forkling-image", len).map_err(|source| Error::Create { len, source })?;
        Ok(Self { memory, len, pages: Vec::new() })
    }

    /// Writes single pages, each once: page `pages[n]` from the nth 4 KiB of `contents`.
    ///
    /// # Panics
    /// When `contents` is too short.
    pub fn write_pages(&mut self, pages: &[u32], contents: &[u8]) -> Result<(), Error> {
        let mut rest = contents;
        for run in pages.chunk_by(|&a, &b| b == a + 1) {
            let (now, later) = rest.split_at(run.len() * PAGE as usize);
            let first = u64::from(run[0]);
            let insert = |source| Error::Insert { chunk: first / CHUNK_PAGES, source };
            self.memory.write(first * PAGE, now).map_err(insert)?;
            self.pages.extend_from_slice(run);
            rest = later;
        }
        Ok(())
    }

    /// The image; filled lazily from now on if this process can.
    pub fn finish(self) -> Result<Image, Error> {
        let Self { memory, len, pages } = self;
        let memory = seal(memory, len)?;
        let allocated = memory.allocated_bytes().map_err(|source| Error::Create { len, source })?;
        // A large page, where the host gives such to every memfd, would make memory look filled that is not.
        if allocated != pages.len() as u64 * PAGE {
            return Image::new(len);
        }
        let image = Image::over(memory);
        if image.filling() == Filling::Lazy {
            pages.iter().for_each(|&page| image.note_page(page.into()));
        }
        Ok(image)
    }

    /// Its memory, to be filled by other means.
    pub(super) fn seal(self) -> Result<SealedMemory, Error> {
        seal(self.memory, self.len)
    }
}

fn seal(memory: MemoryDraft, len: u64) -> Result<SealedMemory, Error> {
    memory.seal().map_err(|source| Error::Create { len, source })
}
