//! Where the memory of a fork is, as the kernel tells: `/proc/PID/smaps`, `status`, `fd`, and its page tables.

use std::{fs, io, ops::Range};

use forkling_vmm::sys::pagemap::{Pagemap, Pages, total};

use crate::api::types::ForkMemory;

/// How `/proc` calls the mapping of an image (memfd_create(2)).
const IMAGE: &str = "/memfd:forkling-image";

/// Bytes of kernel stack of each thread: THREAD_SIZE of x86-64.
const KERNEL_STACK: u64 = 16 << 10;

/// Measures process `pid`. Takes some milliseconds for each GiB that is mapped.
///
/// # Errors
/// Those of the kernel: the process is gone (`NotFound`), or may not be looked at (`PermissionDenied`).
pub fn of(pid: i32) -> io::Result<ForkMemory> {
    let proc = |name: &str| format!("/proc/{pid}/{name}");
    let mapped = Mapped::parse(&fs::read_to_string(proc("smaps"))?);
    if mapped.guest.is_empty() {
        // A process that ends has no memory any more.
        return Err(io::ErrorKind::NotFound.into());
    }
    let pagemap = Pagemap::of(pid)?;
    let pages = |wanted| {
        let found = |range: &Range<u64>| pagemap.find(wanted, range.start, range.end - range.start);
        mapped.guest.iter().map(|range| found(range).map(|found| total(&found))).sum::<io::Result<u64>>()
    };
    let (shared_bytes, private_bytes) = (pages(Pages::Shared)?, pages(Pages::Private)?);
    let status = fs::read_to_string(proc("status"))?;
    let page_table_bytes = field(&status, "VmPTE:").unwrap_or(0) * 1024;
    let threads = field(&status, "Threads:").unwrap_or(0);
    let (mut descriptors, mut sockets) = (0, 0);
    for entry in fs::read_dir(proc("fd"))? {
        let target = fs::read_link(entry?.path());
        descriptors += 1;
        sockets += u64::from(target.is_ok_and(|target| target.to_string_lossy().starts_with("socket:")));
    }
    Ok(ForkMemory {
        guest_bytes: mapped.guest.iter().map(|range| range.end - range.start).sum(),
        shared_bytes,
        private_bytes,
        vmm_private_bytes: mapped.private_kib * 1024,
        page_table_bytes,
        kernel_stack_bytes: threads * KERNEL_STACK,
        overhead_bytes: mapped.private_kib * 1024 + page_table_bytes + threads * KERNEL_STACK,
        threads,
        descriptors,
        sockets,
    })
}

/// What `smaps` says.
#[derive(Debug, Default, PartialEq, Eq)]
struct Mapped {
    /// Where the guest's memory is mapped.
    guest: Vec<Range<u64>>,
    /// Private memory of all other mappings.
    private_kib: u64,
}

impl Mapped {
    fn parse(smaps: &str) -> Self {
        let mut mapped = Self::default();
        let mut is_guest = false;
        for line in smaps.lines() {
            if let Some(range) = range(line) {
                is_guest = line.contains(IMAGE);
                if is_guest {
                    mapped.guest.push(range);
                }
            } else if !is_guest {
                let private = ["Private_Clean:", "Private_Dirty:", "Swap:"];
                mapped.private_kib += private.iter().filter_map(|name| field(line, name)).sum::<u64>();
            }
        }
        mapped
    }
}

/// The addresses of a line that begins a mapping.
fn range(line: &str) -> Option<Range<u64>> {
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

/// The number of the line called `name`.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests;
