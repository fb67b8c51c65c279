//! The pages of the working set once more, by themselves: `working-set.pages`, beside the snapshot and optional.
//!
//! A fork of a template that is on disk touches pages all over its memory; to unpack a chunk of 64 KiB for each takes ten times
//! as long as to read those pages. Here they lie one after the other, uncompressed, in segments that are verified one by one:
//!
//! ```text
//! "fkl-ws2\n" | digest of image.idx | u32 pages | u32 of them urgent | u32 of those written
//!     | pages x u32 number | segments x u128 sum | digest of all before
//! at the next multiple of 4096: the pages, 16 to a segment
//! ```
//!
//! Little-endian. It belongs to the snapshot whose index it names, and holds copies only: without it nothing is lost.
//!
//! The sum of a segment is its XXH3 of 128 bits, and not a digest as elsewhere: it stands beside what it is the sum of, in a file
//! that nothing else vouches for, so it finds what a disk has damaged and no more, whatever function is used. A digest takes
//! six times as long, and that in every cold start.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use twox_hash::XxHash3_128;

use super::{
    CHUNK, ChunkBuffer, ChunkKind, ChunkReader, Damage, Digest, Error, Snapshot, damaged, file, io_error,
};
use crate::{memory::layout::PAGE, sys::page_cache};

const MAGIC: &[u8; 8] = b"fkl-ws2\n";

/// Most pages: 8 MiB. What is beyond comes by chunks.
const MAX_PAGES: usize = 2048;

/// Pages in a segment: as many bytes as a chunk.
pub const SEGMENT_PAGES: usize = CHUNK / PAGE as usize;

const DIGEST: usize = 32;

const SUM: usize = size_of::<u128>();

/// Magic, digest of the index, number of pages, number of urgent ones, of those that are written.
const FIXED: usize = 8 + DIGEST + 4 + 4 + 4;

/// The pages of a working set, on disk.
pub struct PackedPages {
    file: File,
    numbers: Vec<u32>,
    urgent: usize,
    written: usize,
    sums: Vec<u128>,
}

impl PackedPages {
    /// Number of segments.
    pub fn segments(&self) -> usize {
        self.sums.len()
    }

    /// How many segments, the first ones, hold what is wanted before all else.
    pub fn urgent_segments(&self) -> usize {
        segments(self.urgent)
    }

    /// Numbers of the urgent pages that are written, the first of all.
    pub fn written(&self) -> &[u32] {
        &self.numbers[..self.written]
    }

    /// The position of a page among all of them.
    pub fn place(&self, page: u32) -> Option<usize> {
        self.numbers.iter().position(|&number| number == page)
    }

    /// Numbers of the pages in a segment, 1 to 16, in their order. Panics past the end.
    pub fn pages_of(&self, segment: usize) -> &[u32] {
        let first = segment * SEGMENT_PAGES;
        &self.numbers[first..self.numbers.len().min(first + SEGMENT_PAGES)]
    }

    /// Reads and verifies a segment; its pages are at the beginning of the buffer, which is aligned to pages if they are to be read
    /// past the page cache. Panics past the end.
    pub fn read(&self, segment: usize, buffer: &mut ChunkBuffer) -> Result<(), Error> {
        let pages = &mut buffer[..self.pages_of(segment).len() * PAGE as usize];
        let offset = data_offset(self.numbers.len()) + (segment * CHUNK) as u64;
        self.read_at(pages, offset).map_err(io_error("read", file::WORKING_PAGES))?;
        if XxHash3_128::oneshot(pages) != self.sums[segment] {
            return Err(damaged(file::WORKING_PAGES, Damage::Checksum));
        }
        Ok(())
    }

    /// To be called before the first [`PackedPages::read`]: pages are read past the page cache, unless that has them. The image is about
    /// to, and the page cache would hold them a second time, and be one more to copy them.
    pub fn spare_page_cache(&self) {
        // The head, which is there since it was read, says nothing.
        let first = data_offset(self.numbers.len())..data_offset(self.numbers.len()) + PAGE;
        let spared = page_cache::holds(&self.file, first).and_then(|held| match held {
            true => Ok(()),
            false => through_page_cache(&self.file, false),
        });
        if let Err(error) = spared {
            tracing::debug!(%error, "the pages of a working set are read through the page cache");
        }
    }

    fn read_at(&self, pages: &mut [u8], offset: u64) -> io::Result<()> {
        match self.file.read_exact_at(pages, offset) {
            // Larger blocks than pages, or a buffer that is not aligned (open(2), O_DIRECT).
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                through_page_cache(&self.file, true)?;
                self.file.read_exact_at(pages, offset)
            }
            result => result,
        }
    }

    fn decode(snapshot: &Snapshot, file: File, head: &[u8]) -> Result<Self, Error> {
        let bad = |what| damaged(file::WORKING_PAGES, Damage::Structure(what));
        let (fixed, rest) = head.split_at_checked(FIXED).ok_or_else(|| bad("it is too short"))?;
        if fixed[..8] != *MAGIC {
            return Err(damaged(file::WORKING_PAGES, Damage::Header));
        }
        if fixed[8..8 + DIGEST] != snapshot.manifest().image.index.blake3.0 {
            return Err(bad("it belongs to another snapshot"));
        }
        let number =
            |at: usize| u32::from_le_bytes(fixed[at..at + 4].try_into().expect("four bytes")) as usize;
        let [count, urgent, written] = [0, 4, 8].map(|at| number(8 + DIGEST + at));
        if count > MAX_PAGES || urgent > count || written > urgent {
            return Err(bad("its counts are impossible"));
        }
        let length = head_length(count);
        if head.len() < length || Digest::of(&head[..length - DIGEST]).0 != head[length - DIGEST..length] {
            return Err(damaged(file::WORKING_PAGES, Damage::Checksum));
        }
        let (numbers, rest) = rest.split_at(4 * count);
        let numbers: Vec<_> =
            numbers.as_chunks::<4>().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect();
        let in_data = |&number: &u32| {
            let chunk = u64::from(number) / SEGMENT_PAGES as u64;
            chunk < snapshot.index().chunks() && snapshot.index().get(chunk).is_some()
        };
        if !numbers.iter().all(in_data) {
            return Err(bad("it has pages where the memory has none"));
        }
        let sums = &rest.as_chunks::<SUM>().0[..segments(count)];
        let sums = sums.iter().map(|&bytes| u128::from_le_bytes(bytes)).collect();
        Ok(Self { file, numbers, urgent, written, sums })
    }
}

impl Snapshot {
    /// The pages of the recorded working set, if they are there.
    ///
    /// # Errors
    /// [`Error`] when they cannot be read or are not what they should be; the snapshot is as good without them.
    pub fn working_pages(&self) -> Result<Option<PackedPages>, Error> {
        let file = match self.directory().open_file(file::WORKING_PAGES) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            result => result.map_err(io_error("open", file::WORKING_PAGES))?,
        };
        let mut head = vec![0; head_length(MAX_PAGES)];
        let length = read_start(&file, &mut head).map_err(io_error("read", file::WORKING_PAGES))?;
        PackedPages::decode(self, file, &head[..length]).map(Some)
    }

    /// Encodes the urgent pages that are written, the urgent ones that are read, and then the others, in this order, as many
    /// as may be, without those in chunks of zeros.
    pub(super) fn pack_pages(&self, parts: [Vec<u64>; 3]) -> Result<Vec<u8>, Error> {
        let with_data = |number: &u64| self.index().get(number / SEGMENT_PAGES as u64).is_some();
        let mut numbers: Vec<u64> = Vec::new();
        let [written, urgent, count] = parts.map(|part| {
            let room = MAX_PAGES - numbers.len();
            numbers.extend(part.into_iter().filter(with_data).take(room));
            numbers.len() as u32
        });
        let mut pages = vec![0; numbers.len() * PAGE as usize];
        self.copy_pages(&numbers, &mut pages)?;
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&self.manifest().image.index.blake3.0);
        [count, urgent, written].iter().for_each(|number| out.extend_from_slice(&number.to_le_bytes()));
        numbers.iter().for_each(|&number| out.extend_from_slice(&(number as u32).to_le_bytes()));
        let sums = pages.chunks(CHUNK).map(XxHash3_128::oneshot);
        sums.for_each(|sum| out.extend_from_slice(&sum.to_le_bytes()));
        let digest = Digest::of(&out);
        out.extend_from_slice(&digest.0);
        out.resize(data_offset(numbers.len()) as usize, 0);
        out.extend_from_slice(&pages);
        Ok(out)
    }

    /// Copies these pages out of their chunks, each chunk unpacked once.
    fn copy_pages(&self, numbers: &[u64], out: &mut [u8]) -> Result<(), Error> {
        let mut places: Vec<(u64, usize)> = numbers.iter().copied().zip(0..).collect();
        places.sort_unstable();
        let (mut reader, mut buffer) = (ChunkReader::new()?, Box::new([0; CHUNK]));
        for group in places.chunk_by(|a, b| a.0 / SEGMENT_PAGES as u64 == b.0 / SEGMENT_PAGES as u64) {
            let kind = reader.read(self, group[0].0 / SEGMENT_PAGES as u64, &mut buffer)?;
            debug_assert_eq!(kind, ChunkKind::Data);
            for &(number, place) in group {
                let from = (number as usize % SEGMENT_PAGES) * PAGE as usize;
                out[place * PAGE as usize..][..PAGE as usize]
                    .copy_from_slice(&buffer[from..][..PAGE as usize]);
            }
        }
        Ok(())
    }
}

fn segments(pages: usize) -> usize {
    pages.div_ceil(SEGMENT_PAGES)
}

fn head_length(pages: usize) -> usize {
    FIXED + 4 * pages + SUM * segments(pages) + DIGEST
}

fn data_offset(pages: usize) -> u64 {
    (head_length(pages) as u64).next_multiple_of(PAGE)
}

/// Whether what is read of a file passes through the page cache, from now on.
fn through_page_cache(file: &File, wanted: bool) -> io::Result<()> {
    let mut flags = fcntl_getfl(file)?;
    flags.set(OFlags::DIRECT, !wanted);
    Ok(fcntl_setfl(file, flags)?)
}

fn read_start(file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read_at(&mut buffer[length..], length as u64) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

#[cfg(test)]
mod tests;
