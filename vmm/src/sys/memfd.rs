//! Memory that other processes may map privately and that only this one can fill.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use memmap2::{Advice, MmapRaw};
use rustix::fs::{self, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;

/// A sparse memfd of fixed length. This process keeps the only writable mapping there will ever be: the descriptor is
/// sealed against all other writes, against new writable mappings, holes and changes of length (F_SEAL_FUTURE_WRITE,
/// fcntl(2)), and is kept and handed out read-only.
#[derive(Debug)]
pub struct SealedMemory {
    /// Not to be read where the memfd has holes: that would fill them.
    mapping: MmapRaw,
    reader: OwnedFd,
}

/// Memory that nobody else has yet: filled by plain writes, which whoever had it would see happen.
#[derive(Debug)]
pub struct MemoryDraft(File);

impl MemoryDraft {
    /// All zeros, nothing allocated. `len` is a whole number of pages, above zero.
    pub fn new(name: &str, len: u64) -> io::Result<Self> {
        let file = create(name)?;
        fs::ftruncate(&file, len)?;
        Ok(Self(File::from(file)))
    }

    /// Writes whole pages at `offset`.
    pub fn write(&self, offset: u64, pages: &[u8]) -> io::Result<()> {
        self.0.write_all_at(pages, offset)
    }

    /// Ends the filling.
    pub fn seal(self) -> io::Result<SealedMemory> {
        let Self(writer) = self;
        let mapping = MmapRaw::map_raw(&writer)?;
        // A child between fork and exec has no use for it, and copying its page tables takes long.
        mapping.advise(Advice::DontFork)?;
        // Filled page by page; a large page would make memory look filled that is not.
        match mapping.advise(Advice::NoHugePage) {
            // A kernel without large pages does not know the advice.
            Err(error) if error.raw_os_error() != Some(libc::EINVAL) => return Err(error),
            _ => {}
        }
        fs::fcntl_add_seals(
            &writer,
            SealFlags::FUTURE_WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL,
        )?;
        let path = format!("/proc/self/fd/{}", writer.as_raw_fd());
        let reader = fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(SealedMemory { mapping, reader })
    }
}

impl SealedMemory {
    /// All zeros, nothing allocated. `len` is a whole number of pages, above zero.
    pub fn new(name: &str, len: u64) -> io::Result<Self> {
        MemoryDraft::new(name, len)?.seal()
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.mapping.len() as u64
    }

    /// Whether it has no bytes; never so.
    pub fn is_empty(&self) -> bool {
        self.mapping.len() == 0
    }

    /// The read-only descriptor.
    pub fn reader(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }

    /// Bytes of memory that are allocated.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        // st_blocks counts units of 512 bytes whatever st_blksize says (stat(3type)).
        Ok(fs::fstat(&self.reader)?.st_blocks as u64 * 512)
    }

    /// Writes `bytes` at `offset`, not atomically: whoever has the page mapped sees it change.
    ///
    /// # Panics
    /// When the range is not inside.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let to = self.address_of(offset, bytes.len()) as *mut u8;
        // SAFETY: `address_of` asserts that the range is inside the mapping, which is writable and lives as long as
        // `self`; no Rust reference into it exists.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// Host-virtual address of a range of the writable mapping.
    ///
    /// # Panics
    /// When the range is not inside.
    pub(super) fn address_of(&self, offset: u64, len: usize) -> u64 {
        let end = offset.checked_add(len as u64);
        assert!(end.is_some_and(|end| end <= self.len()), "range outside of the memory");
        self.mapping.as_mut_ptr() as u64 + offset
    }
}

fn create(name: &str) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        // Before Linux 6.3.
        Err(Errno::INVAL) => Ok(fs::memfd_create(name, flags)?),
        result => Ok(result?),
    }
}

#[cfg(test)]
mod tests;
