//! Questions to the kernel that no safe interface asks.

use std::{fs::File, io, os::fd::AsRawFd};

/// Whether the kernel has the PAGEMAP_SCAN ioctl (Linux 6.7).
pub fn has_pagemap_scan() -> io::Result<bool> {
    // _IOWR('f', 16, struct pm_scan_arg), twelve u64 fields (linux/fs.h).
    const PAGEMAP_SCAN: libc::Ioctl = 0xC060_6610;
    let mut argument = [0_u64; 12];
    let pagemap = File::open("/proc/self/pagemap")?;
    // SAFETY: the kernel reads and writes `argument`, which has the size in the request number, and no other memory:
    // its all-zero `size` field is refused before anything is scanned.
    let result = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, argument.as_mut_ptr()) };
    // A kernel that knows the request refuses this argument; one that does not says ENOTTY.
    Ok(result == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ENOTTY))
}
