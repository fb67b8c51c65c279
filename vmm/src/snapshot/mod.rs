//! A snapshot on disk: manifest, state and memory chunks.
//!
//! ```text
//! manifest.json              what it is; small, readable, written last
//! manifest.b3                checksum of manifest.json
//! state.json                 vCPUs, VM and devices
//! image.idx                  which chunk of memory has which content
//! chunks/xx/<blake3>.zst     64 KiB of memory each, named by their content, compressed
//! root.erofs                 root image, if the template has one
//! working-set.json           advice on what to load first; optional, see [`working_set`]
//! working-set.pages          the same pages once more, by themselves; optional, see [`packed`]
//! ```
//!
//! Nothing in it is an absolute path and nothing is changed after the commit, so that snapshots can be copied and
//! share chunk files by hard links. Everything read back is untrusted: lengths are bounded, checksums compared, numbers
//! checked, and the name of a chunk file is made from a digest, never taken from a file.

pub mod blob;
mod digest;
mod dir;
mod index;
mod manifest;
pub mod packed;
mod read;
mod store;
pub mod working_set;
mod write;

#[cfg(test)]
mod fixture;

use std::{fmt, io};

pub use crate::memory::image::{AlignedChunk, CHUNK, ChunkBuffer};
pub use digest::{Digest, FileSum};
pub use index::Index;
pub use manifest::{FORMAT, Forkpoint, HostTags, ImageSummary, Manifest};
pub use packed::PackedPages;
pub use read::{ChunkKind, ChunkReader, Snapshot};
pub use store::{ChunkStore, Sharing};
pub use working_set::{PageRange, WorkingSet};
pub use write::{Compression, SnapshotWriter, commit};

/// Names of the files in a snapshot directory.
pub mod file {
    /// Description of the snapshot.
    pub const MANIFEST: &str = "manifest.json";
    /// Checksum of [`MANIFEST`], in the format of `b3sum`.
    pub const MANIFEST_SUM: &str = "manifest.b3";
    /// State of vCPUs, VM and devices.
    pub const STATE: &str = "state.json";
    /// Content of each chunk of memory.
    pub const INDEX: &str = "image.idx";
    /// Directory of the chunk files.
    pub const CHUNKS: &str = "chunks";
    /// Root image.
    pub const ROOT: &str = "root.erofs";
    /// Advice on what to load first.
    pub const WORKING_SET: &str = "working-set.json";
    /// The pages it names.
    pub const WORKING_PAGES: &str = "working-set.pages";
}

/// Why a snapshot cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused a file operation.
    #[error("cannot {action} {file} of the snapshot: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Name in the snapshot directory.
        file: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A file of the snapshot does not exist.
    #[error("snapshot has no {file}: it was never completed or is damaged; build the template again")]
    Missing {
        /// Name in the snapshot directory.
        file: String,
    },
    /// The snapshot was written by a build with another format.
    #[error("snapshot has format {found}, this build reads format {FORMAT} only; build the template again")]
    Format {
        /// Number in the manifest.
        found: u32,
    },
    /// A file's contents are not those that were written.
    #[error(
        "snapshot file {file} is damaged: {damage}; build the template again or restore the file from a copy"
    )]
    Damaged {
        /// Name in the snapshot directory.
        file: String,
        /// What is wrong with it.
        damage: Damage,
    },
    /// A file has the right checksum and yet is not what this build writes.
    #[error("snapshot file {file} is not understood: {source}; build the template again with this version")]
    Json {
        /// Name in the snapshot directory.
        file: &'static str,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A number in the manifest is impossible.
    #[error("manifest: {field} is {value}, not within {min} to {max}; build the template again")]
    OutOfRange {
        /// Name of the field.
        field: &'static str,
        /// What it holds.
        value: u64,
        /// Smallest permitted value.
        min: u64,
        /// Largest permitted value.
        max: u64,
    },
    /// A snapshot is to be written where something is already.
    #[error("snapshot directory already holds {found}; give an empty one")]
    NotEmpty {
        /// One of the names found.
        found: String,
    },
    /// Guest memory could not be read while it was saved.
    #[error("cannot read guest memory at offset {offset:#x}: {source}")]
    Memory {
        /// Offset in the image in bytes.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// zstd could not be set up or refused the compression level.
    #[error("zstd at level {level}: {source}; levels are 1 to 19")]
    Compressor {
        /// The level asked for.
        level: i32,
        /// Why.
        source: io::Error,
    },
}

/// What is wrong with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// It is too short or too long.
    Length {
        /// Bytes it should have, or at most.
        expected: u64,
        /// Bytes it has.
        found: u64,
    },
    /// Its bytes differ from those that were written.
    Checksum,
    /// It does not decompress to one chunk.
    Compression,
    /// Its header is not in the expected form.
    Header,
    /// Its parts contradict one another.
    Structure(&'static str),
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length { expected, found } => write!(f, "{found} bytes long instead of {expected}"),
            Self::Checksum => f.write_str("its checksum is wrong"),
            Self::Compression => f.write_str("it does not decompress to one chunk"),
            Self::Header => f.write_str("its beginning is malformed"),
            Self::Structure(what) => f.write_str(what),
        }
    }
}

impl Error {
    /// True when the snapshot itself is at fault, not this host.
    pub fn is_snapshot_fault(&self) -> bool {
        matches!(
            self,
            Self::Missing { .. }
                | Self::Format { .. }
                | Self::Damaged { .. }
                | Self::Json { .. }
                | Self::OutOfRange { .. }
        )
    }
}

fn io_error(action: &'static str, file: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let file = file.into();
    move |source| match source.kind() {
        io::ErrorKind::NotFound => Error::Missing { file },
        _ => Error::Io { action, file, source },
    }
}

fn damaged(file: impl Into<String>, damage: Damage) -> Error {
    Error::Damaged { file: file.into(), damage }
}
