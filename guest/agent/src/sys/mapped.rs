//! The start of a file, mapped so that it can be overwritten without a system call.

use std::fs::File;
use std::{io, ptr, slice};

use rustix::mm::{MapFlags, ProtFlags};

/// Bytes of the file that can be overwritten: its first page.
pub const LEN: usize = 4096;

/// The first page of a file, mapped shared.
#[derive(Debug)]
pub struct MappedStart(*mut u8);

impl MappedStart {
    /// Maps the start of a file open for reading and writing, and touches it.
    pub fn new(file: &File) -> io::Result<Self> {
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: a new mapping at an address the kernel chooses aliases nothing.
        let start = unsafe {
            rustix::mm::mmap(ptr::null_mut(), LEN, ProtFlags::READ | ProtFlags::WRITE, flags, file, 0)
        }?;
        Ok(Self(start.cast()))
    }

    /// Overwrites the start of the file with `bytes`, which are not longer than the file: behind its end there is
    /// nothing to write to.
    ///
    /// # Panics
    /// When `bytes` is longer than [`LEN`].
    pub fn overwrite(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= LEN, "identity lines are short");
        // SAFETY: the page is mapped until `drop`, the caller keeps `bytes` within the file, no other program runs
        // between a forkpoint and the acknowledgement (`quiet`), and no other reference to it exists in this one.
        let page = unsafe { slice::from_raw_parts_mut(self.0, bytes.len()) };
        page.copy_from_slice(bytes);
    }
}

impl Drop for MappedStart {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` and nothing refers to it any more.
        let unmapped = unsafe { rustix::mm::munmap(self.0.cast(), LEN) };
        debug_assert!(unmapped.is_ok(), "a mapping of ours can be unmapped");
    }
}
