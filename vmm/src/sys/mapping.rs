//! Memory mappings that live as long as the process.
//!
//! One process holds one VM, so nothing is gained by unmapping guest memory before the process ends, and much is
//! lost: every user of an address would have to prove that the mapping still exists. A [`Mapping`] is therefore
//! never unmapped, and all that is derived from it stays valid.

use std::{io, os::fd::AsFd};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise};
use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};

/// A mapping of this process that is never unmapped.
#[derive(Clone, Copy, Debug)]
pub struct Mapping {
    address: usize,
    len: usize,
}

impl Mapping {
    /// Private zeroed memory, allocated when touched.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses a free range, so no existing object is overlaid.
        let address = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags)?
        };
        Ok(Self { address: address as usize, len })
    }

    /// A copy-on-write view of the first `len` bytes of a file: writes stay in this process.
    pub fn copy_on_write(file: impl AsFd, len: usize) -> io::Result<Self> {
        Self::of_file(file, len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE)
    }

    /// A read-only view of the first `len` bytes of a file, sharing the page cache.
    pub fn read_only(file: impl AsFd, len: usize) -> io::Result<Self> {
        Self::of_file(file, len, ProtFlags::READ, MapFlags::SHARED)
    }

    fn of_file(file: impl AsFd, len: usize, protection: ProtFlags, flags: MapFlags) -> io::Result<Self> {
        // SAFETY: the kernel chooses a free range, so no existing object is overlaid.
        let address = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, flags, file, 0)? };
        Ok(Self { address: address as usize, len })
    }

    /// Makes this process's own copies of `[offset, offset + len)`, whole pages, in one go: MADV_POPULATE_WRITE of Linux
    /// 5.14.
    ///
    /// # Errors
    /// ENOMEM; EINVAL before Linux 5.14; EFAULT when a page cannot be had.
    pub fn copy(&self, offset: u64, len: u64) -> io::Result<()> {
        let start = self.piece(offset, len);
        // SAFETY: the range lies in this mapping (`piece`); its contents stay what they are.
        Ok(unsafe { madvise(start, len as usize, Advice::LinuxPopulateWrite) }?)
    }

    /// Throws the process's own copies in `[offset, offset + len)` away: the pages are those of the file again.
    ///
    /// # Errors
    /// Those of madvise(2).
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let start = self.piece(offset, len);
        // SAFETY: the range lies in this mapping (`piece`), which is guest memory: no Rust object lives in it.
        Ok(unsafe { madvise(start, len as usize, Advice::LinuxDontNeed) }?)
    }

    fn piece(&self, offset: u64, len: u64) -> *mut std::ffi::c_void {
        let end = offset.checked_add(len);
        assert!(end.is_some_and(|end| end <= self.len as u64), "piece outside of the mapping");
        (self.address + offset as usize) as *mut _
    }

    /// Host-virtual start in bytes.
    pub fn address(&self) -> u64 {
        self.address as u64
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the mapping has no bytes; the kernel never makes such a one.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The piece `[offset, offset + len)` as guest memory at `gpa`, for checked volatile access.
    ///
    /// # Panics
    /// When the piece is not inside the mapping.
    pub fn guest_region(&self, offset: usize, len: usize, gpa: u64) -> GuestRegionMmap<()> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "piece outside of the mapping");
        let start = (self.address + offset) as *mut u8;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the piece lies in this mapping (asserted above), which is never unmapped.
        let region = unsafe { MmapRegion::build_raw(start, len, protection, libc::MAP_PRIVATE) }
            .expect("the mapping is page aligned");
        GuestRegionMmap::new(region, GuestAddress(gpa)).expect("layout keeps regions below 2^64")
    }
}
