//! One copy on disk of chunks that several snapshots have: `chunks/xx/<blake3>.zst` in the directory that holds them all.
//!
//! A snapshot stays complete in itself: its chunk files become hard links of those in the store, so each snapshot can be
//! copied, moved or removed without a thought for the others, and the store is nowhere named in it. A file of the store
//! with no other link belongs to no snapshot and is removed when that is noticed.
//!
//! What enters the store is verified first and written anew: whoever wrote the snapshot, a process that a guest may have
//! taken over, never had a file open for writing that other snapshots use.

use std::io::{self, Write as _};
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

use rustix::io::Errno;

use super::dir::Dir;
use super::write::chunk_path;
use super::{CHUNK, ChunkReader, Digest, Error, Snapshot, file, io_error};

/// Ending of the names of chunk files.
const SUFFIX: &str = ".zst";

/// The chunk files of all snapshots below one directory. One process uses it at a time.
pub struct ChunkStore {
    dir: Dir,
    /// Held while a file of the store has no link yet that shows it to be in use.
    changing: Mutex<()>,
}

/// What sharing a snapshot's chunks brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sharing {
    /// Chunk files that other snapshots had already.
    pub found: u64,
    /// Their length in bytes: what was saved.
    pub found_bytes: u64,
    /// Chunk files that were new.
    pub added: u64,
    /// Chunk files left alone, because the file system takes no more links to them, or none at all.
    pub alone: u64,
}

impl ChunkStore {
    /// The store in the directory at `path`; made if there is none.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let dir = Dir::open(path)?;
        dir.create_dir(file::CHUNKS).map_err(io_error("create", file::CHUNKS))?;
        Ok(Self { dir, changing: Mutex::new(()) })
    }

    /// Makes the chunk files of a snapshot links of the store's, and makes that durable. Each is replaced in one step: the
    /// snapshot is complete at any time.
    ///
    /// # Errors
    /// [`Error`] when a chunk is damaged or cannot be read, or the disk is full; the snapshot is still complete.
    pub fn share(&self, snapshot: &Snapshot) -> Result<Sharing, Error> {
        let mut reader = ChunkReader::new()?;
        let mut sharing = Sharing::default();
        for digest in snapshot.index().contents() {
            self.share_one(snapshot, digest, &mut reader, &mut sharing)?;
        }
        self.dir.sync_file_system().map_err(io_error("sync", file::CHUNKS))?;
        Ok(sharing)
    }

    fn share_one(
        &self,
        snapshot: &Snapshot,
        digest: &Digest,
        reader: &mut ChunkReader,
        sharing: &mut Sharing,
    ) -> Result<(), Error> {
        let (parent, name) = chunk_path(digest);
        let _changing = self.lock();
        let known = self.dir.stat(&name).ok();
        let own = snapshot.directory().stat(&name).map_err(io_error("inspect", &name))?;
        if known.is_some_and(|known| (known.st_dev, known.st_ino) == (own.st_dev, own.st_ino)) {
            return Ok(());
        }
        // Without another link it belongs to a snapshot that was never finished, and may not even be on the disk.
        let known = known.filter(|known| known.st_nlink > 1);
        if known.is_none() {
            self.add(snapshot, digest, reader, &parent, &name)?;
        }
        match self.link_into(snapshot, &parent, &name) {
            Ok(()) => {}
            Err(Errno::MLINK | Errno::XDEV | Errno::PERM | Errno::OPNOTSUPP) => {
                sharing.alone += 1;
                return Ok(());
            }
            Err(error) => return Err(io_error("link", name)(error.into())),
        }
        match known {
            Some(known) => {
                sharing.found += 1;
                sharing.found_bytes += known.st_size.unsigned_abs();
            }
            None => sharing.added += 1,
        }
        Ok(())
    }

    /// Copies a chunk file into the store, verified.
    fn add(
        &self,
        snapshot: &Snapshot,
        digest: &Digest,
        reader: &mut ChunkReader,
        parent: &str,
        name: &str,
    ) -> Result<(), Error> {
        let mut buffer = [0; CHUNK];
        let packed = reader.read_packed(snapshot, digest, &mut buffer)?;
        let beside = format!("{name}.new");
        let create = || {
            self.dir.create_dir(parent)?;
            match self.dir.remove_file(&beside) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            self.dir.create_file(&beside)?.write_all(packed)?;
            self.dir.rename(&beside, name)
        };
        create().map_err(io_error("write", name))
    }

    fn link_into(&self, snapshot: &Snapshot, parent: &str, name: &str) -> Result<(), Errno> {
        let beside = format!("{parent}/.new");
        let into = snapshot.directory();
        match self.dir.link(name, into, &beside) {
            // What a crash left.
            Err(Errno::EXIST) => {
                into.remove_file(&beside).map_err(|_| Errno::IO)?;
                self.dir.link(name, into, &beside)?;
            }
            result => result?,
        }
        into.rename(&beside, name).map_err(|_| Errno::IO)
    }

    /// The chunks of which there are files in the snapshot directory at `path`, valid or not.
    pub fn chunks_of(path: &Path) -> Vec<Digest> {
        let Ok(dir) = Dir::open(path) else { return Vec::new() };
        let mut found = Vec::new();
        for_each_chunk(&dir, |digest| found.push(digest));
        found
    }

    /// Removes those of these chunks that no snapshot has any more.
    pub fn release(&self, chunks: &[Digest]) {
        chunks.iter().for_each(|digest| drop(self.drop_unused(&chunk_path(digest).1)));
    }

    /// Removes all chunks that no snapshot has: what was unfinished when this process was killed. Returns their number.
    pub fn sweep(&self) -> u64 {
        let mut removed = 0;
        for_each_chunk(&self.dir, |digest| {
            removed += u64::from(self.drop_unused(&chunk_path(&digest).1).unwrap_or(false));
        });
        removed
    }

    fn drop_unused(&self, name: &str) -> io::Result<bool> {
        let _changing = self.lock();
        let unused = self.dir.stat(name)?.st_nlink == 1;
        if unused {
            self.dir.remove_file(name)?;
        }
        Ok(unused)
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().expect("no panic under this lock")
    }
}

impl std::fmt::Debug for ChunkStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkStore").finish_non_exhaustive()
    }
}

/// Calls `see` for each file with the name of a chunk.
fn for_each_chunk(dir: &Dir, mut see: impl FnMut(Digest)) {
    for prefix in dir.names_in(file::CHUNKS).unwrap_or_default() {
        for name in dir.names_in(&format!("{}/{prefix}", file::CHUNKS)).unwrap_or_default() {
            if let Some(Ok(digest)) = name.strip_suffix(SUFFIX).map(str::parse::<Digest>) {
                see(digest);
            }
        }
    }
}

#[cfg(test)]
mod tests;
