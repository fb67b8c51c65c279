//! How much of a private mapping is really private: pages the process has written, and shares with nobody.

use std::fs::File;
use std::io::{self, BufRead, BufReader};

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

/// Whose memory is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// This process.
    Own,
    /// Another one, which this process may trace.
    Other(u32),
}

impl Process {
    fn open(self, file: &str) -> io::Result<File> {
        match self {
            Self::Own => File::open(format!("/proc/self/{file}")),
            Self::Other(pid) => File::open(format!("/proc/{pid}/{file}")),
        }
    }
}

/// Bytes of `[address, address + len)`, one private mapping, that are the process's own copies, in memory or swapped
/// out. By PAGEMAP_SCAN (Linux 6.7), elsewhere from smaps, which is slower.
pub fn private_bytes(process: Process, address: u64, len: u64) -> io::Result<u64> {
    match scan(&process.open("pagemap")?, address, len) {
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => from_smaps(process, address, len),
        result => result,
    }
}

fn scan(pagemap: &File, address: u64, len: u64) -> io::Result<u64> {
    let end = address + len;
    let mut regions = vec![PageRegion::default(); REGIONS];
    let (mut from, mut bytes) = (address, 0);
    while from < end {
        let mut request = ScanRequest {
            size: size_of::<ScanRequest>() as u64,
            start: from,
            end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: REGIONS as u64,
            // Neither in the page cache nor the page of zeros, and there at all.
            category_inverted: IS_FILE | IS_ZERO,
            category_mask: IS_FILE | IS_ZERO,
            category_anyof_mask: IS_PRESENT | IS_SWAPPED,
            return_mask: IS_PRESENT | IS_SWAPPED,
            ..ScanRequest::default()
        };
        // SAFETY: the kernel fills at most `vec_len` regions at `vec`, which is `regions`, alive and not otherwise
        // borrowed, and writes `request`.
        let found = unsafe { ioctl(pagemap, Scan(&mut request)) }?;
        bytes += regions[..found].iter().map(|region| region.end - region.start).sum::<u64>();
        if request.walk_end <= from {
            return Err(io::Error::other("PAGEMAP_SCAN makes no progress"));
        }
        from = request.walk_end;
    }
    Ok(bytes)
}

/// Sums `Anonymous` and `Swap` of the mappings inside the range (proc_pid_smaps(5)).
fn from_smaps(process: Process, address: u64, len: u64) -> io::Result<u64> {
    let (mut inside, mut kib) = (false, 0);
    for line in BufReader::new(process.open("smaps")?).lines() {
        let line = line?;
        let mut words = line.split_ascii_whitespace();
        let (first, second) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        if let Some((start, end)) = parse_range(first) {
            inside = start >= address && end <= address + len;
        } else if inside && matches!(first, "Anonymous:" | "Swap:") {
            kib += second.parse::<u64>().map_err(|_| io::Error::other("smaps has an unknown form"))?;
        }
    }
    Ok(kib * 1024)
}

fn parse_range(word: &str) -> Option<(u64, u64)> {
    let (start, end) = word.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
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
