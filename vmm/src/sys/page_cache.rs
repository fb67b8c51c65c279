//! What the kernel holds of files.

use std::fs::File;
use std::io;
use std::ops::Range;

use memmap2::MmapOptions;

use crate::memory::layout::PAGE;

/// Whether a range of a file, from a page on, is in the page cache, all of it (mincore(2)). The kernel says so of every file that the
/// caller neither owns nor may write.
///
/// # Errors
/// Those of the kernel: it cannot be mapped.
pub fn holds(file: &File, range: Range<u64>) -> io::Result<bool> {
    let len = (range.end - range.start) as usize;
    let mapping = MmapOptions::new().offset(range.start).len(len).map_raw_read_only(file)?;
    let mut pages = vec![0; len.div_ceil(PAGE as usize)];
    // SAFETY: the mapping is alive and has `len` bytes, and the kernel writes one byte to `pages` for each page of it.
    let result = unsafe { libc::mincore(mapping.as_mut_ptr().cast(), len, pages.as_mut_ptr()) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(pages.iter().all(|page| page & 1 != 0))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    #[test]
    fn a_hole_is_not_there_and_what_was_written_is() {
        let file = File::from(memfd_create("file", MemfdFlags::CLOEXEC).unwrap());
        file.write_all_at(&[1; 2 * PAGE as usize], 0).unwrap();
        file.write_all_at(&[1], 3 * PAGE).unwrap();
        let held = [1, 4096, 4097, 8192, 8193, 16384].map(|len| holds(&file, 0..len).unwrap());
        assert_eq!(held, [true, true, true, true, false, false]);
        assert!(holds(&file, 3 * PAGE..4 * PAGE).unwrap() && !holds(&file, 2 * PAGE..4 * PAGE).unwrap());
        assert!(!holds(&file, 0..1 << 20).unwrap(), "beyond its end there is nothing");
        assert!(holds(&file, 0..0).unwrap());
    }
}
