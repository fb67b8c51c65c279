//! Memory mappings that live as long as the process.
//!
//! One process holds one VM, so nothing is gained by unmapping guest memory before the process ends, and much is
//! lost: every user of an address would have to prove that the mapping still exists. A [`Mapping`] is therefore
//! never unmapped, and all that is derived from it stays valid.

use std::{io, os::fd::AsFd};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise};
use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};

/// Bytes of a large page, and the multiple at which a mapping of a file starts: what a large page holds is mapped as one
/// only if file and address agree in it, and KVM asks the same of address and guest-physical address.
pub const LARGE_PAGE: u64 = 2 << 20;

/// Page size in bytes.
const PAGE: usize = 4096;

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
        let start = Self::reserve(len)?;
        // SAFETY: the range was reserved for this and nobody else knows it.
        unsafe { rustix::mm::mmap(start, len, protection, flags | MapFlags::FIXED, file, 0)? };
        Ok(Self { address: start as usize, len })
    }

    /// An address range for `len` bytes that starts at a multiple of [`LARGE_PAGE`].
    fn reserve(len: usize) -> io::Result<*mut std::ffi::c_void> {
        let large = LARGE_PAGE as usize;
        let all = len.checked_add(large).ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses a free range, so no existing object is overlaid.
        let found =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), all, ProtFlags::empty(), flags)? };
        let before = (found as usize).next_multiple_of(large) - found as usize;
        let start = found.wrapping_byte_add(before);
        let used = len.next_multiple_of(PAGE);
        // What is not used is a mapping of its own, which each fork would copy.
        for (piece, len) in [(found, before), (start.wrapping_byte_add(used), all - before - used)] {
            if len > 0 {
                // SAFETY: the piece lies in the reservation made above, which nobody uses yet.
                unsafe { rustix::mm::munmap(piece, len)? };
            }
        }
        Ok(start)
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

    /// Maps `[offset, offset + len)`, whole pages, for reading: MADV_POPULATE_READ of Linux 5.14.
    ///
    /// # Errors
    /// As [`Mapping::copy`].
    pub fn populate(&self, offset: u64, len: u64) -> io::Result<()> {
        let start = self.piece(offset, len);
        // SAFETY: the range lies in this mapping (`piece`); its contents stay what they are.
        Ok(unsafe { madvise(start, len as usize, Advice::LinuxPopulateRead) }?)
    }

    /// Has processes forked from this one inherit what it has mapped of the file, where the kernel would have them fault for each page: a
    /// private mapping's page tables are copied as soon as a page of it was ever written (vma_needs_copy() of mm/memory.c). The page at
    /// `offset` is written for that, its copy thrown away.
    ///
    /// # Errors
    /// As [`Mapping::copy`].
    pub fn inherit_page_tables(&self, offset: u64) -> io::Result<()> {
        self.copy(offset, PAGE as u64)?;
        self.discard(offset, PAGE as u64)
    }

    /// Has the pages of the mapped file in `[offset, offset + len)`, whole large pages of a memfd, stored in large pages and
    /// mapped so: MADV_COLLAPSE of Linux 6.1. Takes the time of a copy.
    ///
    /// # Errors
    /// EINVAL before Linux 6.1, without large pages, and where they are denied to the process; ENOMEM, EAGAIN.
    pub fn collapse(&self, offset: u64, len: u64) -> io::Result<()> {
        let start = self.piece(offset, len);
        // SAFETY: the range lies in this mapping (`piece`); its contents stay what they are.
        match unsafe { libc::madvise(start, len as usize, libc::MADV_COLLAPSE) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
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

    /// Maps `file` anew, copy-on-write, where [`Mapping::copy_on_write`] has mapped it: the process's own copies go, and so do the page tables,
    /// its own and those that KVM has for the guest.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn renew(&self, file: impl AsFd) -> io::Result<()> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the range is this mapping, which is guest memory: no Rust object lives in it, and it is mapped again at once.
        unsafe { rustix::mm::mmap(self.address as *mut _, self.len, protection, flags, file, 0)? };
        Ok(())
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

#[cfg(test)]
mod tests;
