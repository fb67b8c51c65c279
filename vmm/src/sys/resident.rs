//! A program kept in memory, so that starting it never waits for a disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use memmap2::{MmapOptions, MmapRaw};

/// Most bytes of a program that are kept: one that has more is not one of ours.
const MOST: u64 = 64 << 20;

/// Most program headers looked at.
const MOST_HEADERS: u64 = 64;

/// Type of a segment that is loaded, PT_LOAD of the System V ABI.
const LOAD: u32 = 1;

/// The part of a program's file that is loaded when it runs: mapped and brought in, so that the kernel keeps it. What else
/// is in the file, such as symbols, is not.
#[derive(Debug)]
pub struct ResidentProgram(MmapRaw);

impl ResidentProgram {
    /// Of the 64-bit ELF file at `path`.
    ///
    /// # Errors
    /// Those of the kernel, and [`io::ErrorKind::InvalidData`] for anything else than such a file.
    pub fn new(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let len = loaded_len(&file)?.min(file.metadata()?.len());
        let len = usize::try_from(len).map_err(|_| invalid())?;
        MmapOptions::new().len(len).populate().map_raw_read_only(&file).map(Self)
    }

    /// Bytes that are kept.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing is kept; never so.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Where the last loaded segment ends in the file.
fn loaded_len(file: &File) -> io::Result<u64> {
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0)?;
    if header[..5] != *b"\x7fELF\x02" {
        return Err(invalid());
    }
    let (table, size, count) = (number(&header, 32, 8), number(&header, 54, 2), number(&header, 56, 2));
    let mut end = 0;
    for index in 0..count.min(MOST_HEADERS) {
        let mut segment = [0; 56];
        file.read_exact_at(&mut segment, table.checked_add(index * size).ok_or_else(invalid)?)?;
        if number(&segment, 0, 4) == u64::from(LOAD) {
            let after = number(&segment, 8, 8).checked_add(number(&segment, 32, 8));
            end = end.max(after.ok_or_else(invalid)?);
        }
    }
    if (1..=MOST).contains(&end) { Ok(end) } else { Err(invalid()) }
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

fn invalid() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "not a 64-bit ELF program of a usual size")
}

#[cfg(test)]
mod tests;
