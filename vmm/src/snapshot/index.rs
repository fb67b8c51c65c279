//! Which chunk of memory has which content: `image.idx`.
//!
//! Binary, little-endian, because a 64 GiB image has a million chunks:
//!
//! ```text
//! u64 chunks | u64 contents | contents x 32-byte digest | runs
//! run: u32 length, u32 first      first = 0: `length` zero chunks
//!                                 else: contents first - 1, first, ..., one for each of `length` chunks
//! ```
//!
//! Contents are numbered in order of first use, so memory without repetition is a handful of runs.

use std::collections::HashMap;

use super::{Damage, Digest, Error, damaged, file};
use crate::memory::layout::{MAX_MEMORY_MIB, MIB};

const HEADER: usize = 16;
const DIGEST: usize = 32;
const RUN: usize = 8;

/// Most chunks an image can have.
pub(super) const MAX_CHUNKS: u64 = MAX_MEMORY_MIB as u64 * MIB / super::CHUNK as u64;

/// Contents of all chunks of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    /// Each content once.
    contents: Vec<Digest>,
    /// Per chunk: 0 for zeros, else one more than the position in `contents`.
    chunks: Vec<u32>,
}

impl Index {
    /// From the content of each chunk; `None` is all zeros.
    pub fn new(chunks: impl IntoIterator<Item = Option<Digest>>) -> Self {
        let mut contents = Vec::new();
        let mut numbers = HashMap::new();
        let mut number = |digest| {
            *numbers.entry(digest).or_insert_with(|| {
                contents.push(digest);
                u32::try_from(contents.len()).expect("an image has at most a million chunks")
            })
        };
        let chunks = chunks.into_iter().map(|chunk| chunk.map_or(0, &mut number)).collect();
        Self { contents, chunks }
    }

    /// Number of chunks.
    pub fn chunks(&self) -> u64 {
        self.chunks.len() as u64
    }

    /// Number of chunks that are not all zeros.
    pub fn data_chunks(&self) -> u64 {
        self.chunks.iter().filter(|&&number| number != 0).count() as u64
    }

    /// Number of different contents other than zeros.
    pub fn unique_chunks(&self) -> u64 {
        self.contents.len() as u64
    }

    /// Every content once.
    pub fn contents(&self) -> &[Digest] {
        &self.contents
    }

    /// Content of a chunk, `None` for zeros. Panics past the end.
    pub fn get(&self, chunk: u64) -> Option<Digest> {
        let number = self.chunks[usize::try_from(chunk).expect("fits the address space")];
        number.checked_sub(1).map(|position| self.contents[position as usize])
    }

    /// Encodes as described above.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + DIGEST * self.contents.len() + RUN);
        out.extend_from_slice(&self.chunks().to_le_bytes());
        out.extend_from_slice(&self.unique_chunks().to_le_bytes());
        self.contents.iter().for_each(|digest| out.extend_from_slice(&digest.0));
        let follows = |&a: &u32, &b: &u32| if a == 0 { b == 0 } else { b == a + 1 };
        for run in self.chunks.chunk_by(follows) {
            out.extend_from_slice(&(run.len() as u32).to_le_bytes());
            out.extend_from_slice(&run[0].to_le_bytes());
        }
        out
    }

    /// Longest encoding in bytes of an image of so many chunks and contents.
    pub(super) fn encoded_limit(chunks: u64, contents: u64) -> u64 {
        HEADER as u64 + DIGEST as u64 * contents + RUN as u64 * chunks
    }

    /// Decodes; everything is checked.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let bad = |what| damaged(file::INDEX, Damage::Structure(what));
        let (header, rest) = bytes.split_at_checked(HEADER).ok_or_else(|| bad("it is too short"))?;
        let chunks = u64_at(header, 0);
        let contents = u64_at(header, 8);
        if chunks > MAX_CHUNKS || contents > chunks {
            return Err(bad("its counts are impossible"));
        }
        let digests = DIGEST * contents as usize;
        let (digests, runs) = rest.split_at_checked(digests).ok_or_else(|| bad("digests are missing"))?;
        let contents: Vec<_> = digests.as_chunks::<DIGEST>().0.iter().map(|&bytes| Digest(bytes)).collect();
        let chunks = decode_runs(runs, chunks, contents.len() as u32).map_err(bad)?;
        Ok(Self { contents, chunks })
    }
}

fn decode_runs(runs: &[u8], chunks: u64, contents: u32) -> Result<Vec<u32>, &'static str> {
    let mut out = Vec::with_capacity(chunks as usize);
    let (runs, tail) = runs.as_chunks::<RUN>();
    if !tail.is_empty() {
        return Err("its last run is cut off");
    }
    for run in runs {
        let length = u32::from_le_bytes([run[0], run[1], run[2], run[3]]);
        let first = u32::from_le_bytes([run[4], run[5], run[6], run[7]]);
        if length == 0 || u64::from(length) > chunks - out.len() as u64 {
            return Err("a run has an impossible length");
        }
        if first == 0 {
            out.resize(out.len() + length as usize, 0);
        } else {
            let end = first.checked_add(length).filter(|&end| end <= contents + 1);
            out.extend(first..end.ok_or("a run names a content that does not exist")?);
        }
    }
    if out.len() as u64 == chunks { Ok(out) } else { Err("its runs do not cover the memory") }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

const _: () = assert!(MAX_CHUNKS == 1 << 20, "format 1 counts chunks of at most 64 GiB");
const _: () = assert!(size_of::<Digest>() == DIGEST);

#[cfg(test)]
mod tests;
