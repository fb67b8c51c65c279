//! Reading a snapshot: everything is verified before it is used.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use serde::de::DeserializeOwned;

use super::dir::Dir;
use super::manifest::MAX_MANIFEST;
use super::write::{chunk_path, manifest_sum};
use super::{
    CHUNK, ChunkBuffer, Damage, Digest, Error, FORMAT, FileSum, Index, Manifest, damaged, file, io_error,
};

/// A snapshot whose manifest and index are verified and in memory.
pub struct Snapshot {
    dir: Dir,
    manifest: Manifest,
    index: Index,
}

impl Manifest {
    /// The state in `file`, which is `state.json` of the snapshot that this manifest is of; verified and decoded.
    pub fn read_state<S: DeserializeOwned>(&self, file: &File) -> Result<S, Error> {
        serde_json::from_slice(&self.state_json(file)?)
            .map_err(|source| Error::Json { file: file::STATE, source })
    }

    fn state_json(&self, file: &File) -> Result<Vec<u8>, Error> {
        let found = file.metadata().map_err(io_error("inspect", file::STATE))?.len();
        check_length(file::STATE, self.state.length, found)?;
        let mut bytes = vec![0; found as usize];
        // Whoever else has the descriptor shares its position.
        file.read_exact_at(&mut bytes, 0).map_err(io_error("read", file::STATE))?;
        check_sum(file::STATE, &self.state, &FileSum::of_bytes(&bytes))?;
        Ok(bytes)
    }
}

impl Snapshot {
    /// Opens the snapshot in the directory at `path`.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::read(Dir::open(path)?)
    }

    fn read(dir: Dir) -> Result<Self, Error> {
        let text = dir.read(file::MANIFEST, MAX_MANIFEST)?;
        // First, so that another format is called by its name and not damaged.
        let format = Manifest::decode_format(&text);
        if let Ok(found) = format
            && found != FORMAT
        {
            return Err(Error::Format { found });
        }
        let expected = manifest_sum(&text);
        if dir.read(file::MANIFEST_SUM, expected.len() as u64)? != expected.as_bytes() {
            return Err(damaged(file::MANIFEST, Damage::Checksum));
        }
        let manifest = Manifest::decode(&text)?;
        let index = Index::decode(&read_verified(&dir, file::INDEX, &manifest.image.index)?)?;
        let image = &manifest.image;
        if (index.chunks(), index.data_chunks(), index.unique_chunks())
            != (image.chunks, image.data_chunks, image.unique_chunks)
        {
            return Err(damaged(file::INDEX, Damage::Structure("its counts differ from the manifest's")));
        }
        Ok(Self { dir, manifest, index })
    }

    /// The directory, for the parts of a snapshot that have a module of their own.
    pub(super) fn directory(&self) -> &Dir {
        &self.dir
    }

    /// Its manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Contents of its memory.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// `state.json`, for [`Manifest::read_state`].
    pub fn open_state(&self) -> Result<File, Error> {
        self.dir.open_file(file::STATE).map_err(io_error("open", file::STATE))
    }

    /// `state.json`, verified and decoded.
    pub fn state<S: DeserializeOwned>(&self) -> Result<S, Error> {
        self.manifest.read_state(&self.open_state()?)
    }

    /// The root image, if there is one; only its length is checked, [`Snapshot::verify`] reads it.
    pub fn open_root(&self) -> Result<Option<File>, Error> {
        let Some(expected) = &self.manifest.root else { return Ok(None) };
        let root = self.dir.open_file(file::ROOT).map_err(io_error("open", file::ROOT))?;
        let found = root.metadata().map_err(io_error("inspect", file::ROOT))?.len();
        check_length(file::ROOT, expected.length, found)?;
        Ok(Some(root))
    }

    /// A reader of chunks with buffers of its own.
    pub fn chunk_reader(&self) -> Result<ChunkReader, Error> {
        ChunkReader::new()
    }

    /// Reads and verifies every byte of the snapshot.
    pub fn verify(&self) -> Result<(), Error> {
        self.manifest.state_json(&self.open_state()?)?;
        if let (Some(root), Some(expected)) = (self.open_root()?, &self.manifest.root) {
            let found = FileSum::of_file(&root).map_err(io_error("read", file::ROOT))?;
            check_sum(file::ROOT, expected, &found)?;
        }
        let mut reader = self.chunk_reader()?;
        let mut buffer = [0; CHUNK];
        self.index.contents().iter().try_for_each(|digest| reader.read_content(self, digest, &mut buffer))
    }
}

/// What [`ChunkReader::read`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkKind {
    /// All zeros; nothing was read and the buffer is as it was.
    Zero,
    /// The buffer holds the chunk.
    Data,
}

/// Reads chunks, one at a time. It belongs to one thread; snapshots may take turns.
pub struct ChunkReader {
    decompressor: zstd::bulk::Decompressor<'static>,
    packed: Vec<u8>,
}

impl ChunkReader {
    /// With buffers of its own.
    pub fn new() -> Result<Self, Error> {
        let decompressor =
            zstd::bulk::Decompressor::new().map_err(|source| Error::Compressor { level: 0, source })?;
        Ok(Self { decompressor, packed: vec![0; zstd::zstd_safe::compress_bound(CHUNK) + 1] })
    }

    /// Reads, decompresses and verifies chunk number `chunk`. Panics past the end.
    pub fn read(
        &mut self,
        snapshot: &Snapshot,
        chunk: u64,
        buffer: &mut ChunkBuffer,
    ) -> Result<ChunkKind, Error> {
        match snapshot.index.get(chunk) {
            None => Ok(ChunkKind::Zero),
            Some(digest) => {
                self.read_content(snapshot, &digest, buffer)?;
                Ok(ChunkKind::Data)
            }
        }
    }

    fn read_content(
        &mut self,
        snapshot: &Snapshot,
        digest: &Digest,
        buffer: &mut ChunkBuffer,
    ) -> Result<(), Error> {
        self.read_packed(snapshot, digest, buffer).map(drop)
    }

    /// Reads, decompresses and verifies a content; returns it as it is in its file.
    pub(super) fn read_packed(
        &mut self,
        snapshot: &Snapshot,
        digest: &Digest,
        buffer: &mut ChunkBuffer,
    ) -> Result<&[u8], Error> {
        let (_, name) = chunk_path(digest);
        let mut file = snapshot.dir.open_file(&name).map_err(io_error("open", &name))?;
        let length = read_up_to(&mut file, &mut self.packed).map_err(io_error("read", &name))?;
        // The buffer bounds the output: a chunk that would grow past it is an error.
        match self.decompressor.decompress_to_buffer(&self.packed[..length], &mut buffer[..]) {
            Ok(CHUNK) => {}
            Ok(_) | Err(_) => return Err(damaged(name, Damage::Compression)),
        }
        if Digest::of(buffer) != *digest {
            return Err(damaged(name, Damage::Checksum));
        }
        Ok(&self.packed[..length])
    }
}

fn read_up_to(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read(&mut buffer[length..]) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

fn read_verified(dir: &Dir, name: &str, expected: &FileSum) -> Result<Vec<u8>, Error> {
    let bytes = dir.read(name, expected.length)?;
    check_sum(name, expected, &FileSum::of_bytes(&bytes))?;
    Ok(bytes)
}

fn check_sum(name: &str, expected: &FileSum, found: &FileSum) -> Result<(), Error> {
    check_length(name, expected.length, found.length)?;
    if expected.blake3 == found.blake3 { Ok(()) } else { Err(damaged(name, Damage::Checksum)) }
}

fn check_length(name: &str, expected: u64, found: u64) -> Result<(), Error> {
    if expected == found { Ok(()) } else { Err(damaged(name, Damage::Length { expected, found })) }
}

#[cfg(test)]
mod tests;
