//! Which pages of a private mapping are really private: written by the process, and shared with nobody.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

/// Page size in bytes.
const PAGE: u64 = 4096;

/// Pages in a large page.
const PAGES_OF_LARGE: u64 = 512;

/// Which pages of a mapping are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// The process's own copies, in memory or swapped out.
    Private,
    /// Pages of the mapped file that are in the process's page tables.
    Shared,
}

/// A process's page tables as `/proc/PID/pagemap` shows them.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Of this process.
    ///
    /// # Errors
    /// When `/proc` is not mounted.
    pub fn own() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(Self)
    }

    /// Of another process, which this one may trace.
    ///
    /// # Errors
    /// When it is gone, or may not be traced (EPERM).
    pub fn of(pid: i32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/pagemap")).map(Self)
    }

    /// The wanted pages of `[address, address + len)`, one private file mapping, as byte ranges of addresses in
    /// ascending order. By PAGEMAP_SCAN (Linux 6.7), elsewhere by reading an entry for each page.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn find(&self, wanted: Pages, address: u64, len: u64) -> io::Result<Vec<Range<u64>>> {
        match scan(&self.0, wanted, address, len) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => read(&self.0, wanted, address, len),
            result => result,
        }
    }
}

/// Bytes in all ranges.
pub fn total(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

fn scan(pagemap: &File, wanted: Pages, address: u64, len: u64) -> io::Result<Vec<Range<u64>>> {
    let end = address + len;
    let (inverted, mask) = match wanted {
        // Neither in the page cache nor the page of zeros, and there at all.
        Pages::Private => (IS_FILE | IS_ZERO, IS_FILE | IS_ZERO),
        Pages::Shared => (0, IS_FILE | IS_PRESENT),
    };
    let mut regions = vec![PageRegion::default(); REGIONS];
    let mut from = address;
    let mut pages = Vec::new();
    while from < end {
        let mut request = ScanRequest {
            size: size_of::<ScanRequest>() as u64,
            start: from,
            end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: REGIONS as u64,
            category_inverted: inverted,
            category_mask: mask,
            category_anyof_mask: IS_PRESENT | IS_SWAPPED,
            return_mask: IS_FILE,
            ..ScanRequest::default()
        };
        // SAFETY: the kernel fills at most `vec_len` regions at `vec`, which is `regions`, alive and not otherwise
        // borrowed, and writes `request`.
        let found = unsafe { ioctl(pagemap, Scan(&mut request)) }?;
        regions[..found].iter().for_each(|region| add(&mut pages, region.start..region.end));
        if request.walk_end <= from {
            return Err(io::Error::other("PAGEMAP_SCAN makes no progress"));
        }
        from = request.walk_end;
    }
    Ok(pages)
}

/// One 64-bit entry a page (Documentation/admin-guide/mm/pagemap.rst).
fn read(pagemap: &File, wanted: Pages, address: u64, len: u64) -> io::Result<Vec<Range<u64>>> {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const OF_FILE: u64 = 1 << 61;
    const EXCLUSIVE: u64 = 1 << 56;
    const ENTRY: u64 = size_of::<u64>() as u64;
    // Before Linux 6.11 a large page of a file is not shown as a file's, but all of it as mapped by another process too: the
    // zygote. Copies that a process has made are its alone.
    let is_large = |entries: &[u64]| {
        entries.iter().all(|entry| entry & (PRESENT | SWAPPED | OF_FILE | EXCLUSIVE) == PRESENT)
    };
    let is_wanted = |entry: u64, large: bool| match wanted {
        Pages::Private => entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0 && !large,
        Pages::Shared => entry & PRESENT != 0 && (entry & OF_FILE != 0 || large),
    };
    let mut buffer = vec![0; (PAGES_OF_LARGE * ENTRY) as usize];
    let mut pages = Vec::new();
    let (mut page, end) = (address / PAGE, (address + len) / PAGE);
    while page < end {
        let count = (PAGES_OF_LARGE - page % PAGES_OF_LARGE).min(end - page);
        let bytes = &mut buffer[..(count * ENTRY) as usize];
        pagemap.read_exact_at(bytes, page * ENTRY)?;
        let entry = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        let entries: Vec<u64> = bytes.chunks_exact(ENTRY as usize).map(entry).collect();
        let large = count == PAGES_OF_LARGE && is_large(&entries);
        for entry in entries {
            if is_wanted(entry, large) {
                add(&mut pages, page * PAGE..(page + 1) * PAGE);
            }
            page += 1;
        }
    }
    Ok(pages)
}

/// Appends a range, joined with the last one if they touch.
fn add(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

/// Regions taken from the kernel at a time.
const REGIONS: usize = 512;

// PAGE_IS_* of linux/fs.h.
const IS_FILE: u64 = 1 << 2;
const IS_PRESENT: u64 = 1 << 3;
const IS_SWAPPED: u64 = 1 << 4;
const IS_ZERO: u64 = 1 << 5;

/// struct page_region of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// struct pm_scan_arg of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct ScanRequest {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<ScanRequest>() == 96 && size_of::<PageRegion>() == 24);

/// PAGEMAP_SCAN; its result is the number of regions.
struct Scan<'a>(&'a mut ScanRequest);

// SAFETY: opcode and structure are those of PAGEMAP_SCAN (linux/fs.h), which reads and writes the structure; the
// result is a count.
unsafe impl Ioctl for Scan<'_> {
    type Output = usize;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        opcode::read_write::<ScanRequest>(b'f', 16)
    }

    fn as_ptr(&mut self) -> *mut libc::c_void {
        std::ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut libc::c_void) -> rustix::io::Result<usize> {
        Ok(usize::try_from(output).expect("the kernel counts regions"))
    }
}

#[cfg(test)]
mod tests;
