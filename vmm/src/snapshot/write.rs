//! Writing a snapshot: chunks in parallel, then state, then the manifest, then the commit by rename.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, mpsc};
use std::{iter, thread};

use rustix::fs::{self as rfs, RenameFlags};
use serde::Serialize;

use super::dir::Dir;
use super::{CHUNK, ChunkBuffer, Digest, Error, FileSum, ImageSummary, Index, Manifest, file, io_error};
use crate::memory::layout::LOW_RAM_END;

/// Chunks a worker takes at a time; its buffer is as large.
const BATCH: u64 = 16;

/// Most threads that compress.
const MAX_THREADS: usize = 16;

/// How chunks are compressed.
#[derive(Clone, Copy, Debug)]
pub struct Compression {
    /// zstd level, 1 to 19.
    pub level: i32,
    /// Threads that compress; 0 is one per CPU this process may use.
    pub threads: usize,
}

impl Compression {
    fn threads(self) -> usize {
        match self.threads {
            0 => thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS),
            threads => threads.min(MAX_THREADS),
        }
    }
}

/// Writes one snapshot into an empty directory. Nothing is valid before [`SnapshotWriter::finish`].
pub struct SnapshotWriter {
    dir: Dir,
}

impl SnapshotWriter {
    /// Into the directory at `path`, empty or holding only a root image for [`SnapshotWriter::adopt_root`].
    pub fn create(path: &Path) -> Result<Self, Error> {
        Self::new(Dir::open(path)?)
    }

    /// Into an open directory, empty or holding only a root image for [`SnapshotWriter::adopt_root`].
    pub fn from_fd(dir: OwnedFd) -> Result<Self, Error> {
        Self::new(Dir::from_fd(dir))
    }

    fn new(dir: Dir) -> Result<Self, Error> {
        let names = dir.names().map_err(io_error("list", "the directory"))?;
        match names.into_iter().find(|name| name != file::ROOT) {
            Some(found) => Err(Error::NotEmpty { found }),
            None => Ok(Self { dir }),
        }
    }

    /// Writes the memory of `memory_bytes`, a multiple of [`CHUNK`]. `read` fills a buffer from an offset in the image;
    /// it is called from several threads, for ranges that never cross a multiple of 1 MiB. `progress` gets chunks done and chunks in all, on the caller's thread.
    pub fn write_image<R, P>(
        &self,
        memory_bytes: u64,
        compression: Compression,
        read: R,
        mut progress: P,
    ) -> Result<ImageSummary, Error>
    where
        R: Fn(u64, &mut [u8]) -> io::Result<()> + Sync,
        P: FnMut(u64, u64),
    {
        assert!(memory_bytes.is_multiple_of(CHUNK as u64), "memory is a whole number of chunks");
        self.dir.create_dir(file::CHUNKS).map_err(io_error("create", file::CHUNKS))?;
        let job = Job {
            dir: &self.dir,
            read: &read,
            level: compression.level,
            total: memory_bytes / CHUNK as u64,
            next: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            seen: Mutex::default(),
            stored_bytes: AtomicU64::new(0),
        };
        let chunks = job.run(compression.threads(), &mut progress)?;
        self.write_index(Index::new(chunks), job.stored_bytes.into_inner())
    }

    fn write_index(&self, index: Index, stored_bytes: u64) -> Result<ImageSummary, Error> {
        let bytes = index.encode();
        self.write_file(file::INDEX, &bytes)?;
        Ok(ImageSummary {
            chunk_bytes: CHUNK as u64,
            chunks: index.chunks(),
            data_chunks: index.data_chunks(),
            unique_chunks: index.unique_chunks(),
            stored_bytes,
            index: FileSum::of_bytes(&bytes),
        })
    }

    /// Writes `state.json`.
    pub fn write_state<S: Serialize>(&self, state: &S) -> Result<FileSum, Error> {
        let text =
            serde_json::to_vec_pretty(state).map_err(|source| Error::Json { file: file::STATE, source })?;
        self.write_file(file::STATE, &text)?;
        Ok(FileSum::of_bytes(&text))
    }

    /// Takes the `root.erofs` that is already in the directory.
    pub fn adopt_root(&self) -> Result<FileSum, Error> {
        let root = self.dir.open_file(file::ROOT).map_err(io_error("open", file::ROOT))?;
        FileSum::of_file(&root).map_err(io_error("read", file::ROOT))
    }

    /// Copies the root image from its current position, sharing blocks where the file system can.
    pub fn copy_root(&self, mut root: &File) -> Result<FileSum, Error> {
        let mut copy = self.dir.create_file(file::ROOT).map_err(io_error("create", file::ROOT))?;
        io::copy(&mut root, &mut copy).map_err(io_error("write", file::ROOT))?;
        self.adopt_root()
    }

    /// Makes everything durable and then writes the manifest, which makes the directory a snapshot.
    pub fn finish(self, manifest: &Manifest) -> Result<(), Error> {
        manifest.validate()?;
        self.dir.sync_file_system().map_err(io_error("sync", "the directory"))?;
        let text = manifest.encode();
        self.dir.write_durably(file::MANIFEST, &text)?;
        self.dir.write_durably(file::MANIFEST_SUM, manifest_sum(&text).as_bytes())?;
        self.dir.sync().map_err(io_error("sync", "the directory"))
    }

    fn write_file(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let mut file = self.dir.create_file(name).map_err(io_error("create", name))?;
        file.write_all(bytes).map_err(io_error("write", name))
    }
}

/// The line of `manifest.b3`.
pub(super) fn manifest_sum(manifest: &[u8]) -> String {
    format!("{}  {}\n", Digest::of(manifest), file::MANIFEST)
}

/// Gives a finished snapshot its final name, which must be free, durably. Both are on one file system.
pub fn commit(finished: &Path, name: &Path) -> Result<(), Error> {
    let shown = || name.display().to_string();
    rfs::renameat_with(rfs::CWD, finished, rfs::CWD, name, RenameFlags::NOREPLACE)
        .map_err(|error| io_error("rename to", shown())(error.into()))?;
    let parent = name.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Dir::open(parent)?.sync().map_err(io_error("sync", parent.display().to_string()))
}

/// One `write_image`, shared by its threads.
struct Job<'a, R> {
    dir: &'a Dir,
    read: &'a R,
    level: i32,
    total: u64,
    /// First chunk no worker has taken.
    next: AtomicU64,
    /// Set when one worker failed.
    stop: AtomicBool,
    /// Contents that have a file or are about to get one.
    seen: Mutex<HashSet<Digest>>,
    stored_bytes: AtomicU64,
}

/// Contents of a run of chunks from a first one on.
type Batch = (u64, Vec<Option<Digest>>);

impl<R: Fn(u64, &mut [u8]) -> io::Result<()> + Sync> Job<'_, R> {
    fn run(&self, threads: usize, progress: &mut dyn FnMut(u64, u64)) -> Result<Vec<Option<Digest>>, Error> {
        let mut chunks = vec![None; self.total as usize];
        let (results, received) = mpsc::sync_channel(4 * threads);
        thread::scope(|scope| {
            for _ in 0..threads {
                let results = results.clone();
                scope.spawn(move || self.work(&results));
            }
            drop(results);
            let mut done = 0;
            let mut outcome = Ok(());
            for result in received {
                match result {
                    Ok((first, digests)) => {
                        done += digests.len() as u64;
                        let first = first as usize;
                        chunks[first..first + digests.len()].copy_from_slice(&digests);
                        progress(done, self.total);
                    }
                    Err(error) => outcome = outcome.and(Err(error)),
                }
            }
            outcome
        })?;
        Ok(chunks)
    }

    fn work(&self, results: &mpsc::SyncSender<Result<Batch, Error>>) {
        let outcome = self.work_until_done(results);
        if let Err(error) = outcome {
            self.stop.store(true, Ordering::Relaxed);
            // The receiver outlives all workers.
            let _ = results.send(Err(error));
        }
    }

    fn work_until_done(&self, results: &mpsc::SyncSender<Result<Batch, Error>>) -> Result<(), Error> {
        let mut compressor = zstd::bulk::Compressor::new(self.level)
            .map_err(|source| Error::Compressor { level: self.level, source })?;
        let mut memory = vec![0; BATCH as usize * CHUNK];
        let mut packed = vec![0; zstd::zstd_safe::compress_bound(CHUNK)];
        while !self.stop.load(Ordering::Relaxed) {
            let first = self.next.fetch_add(BATCH, Ordering::Relaxed);
            if first >= self.total {
                break;
            }
            let count = BATCH.min(self.total - first);
            let memory = &mut memory[..count as usize * CHUNK];
            let offset = first * CHUNK as u64;
            (self.read)(offset, memory).map_err(|source| Error::Memory { offset, source })?;
            let mut digests = Vec::with_capacity(count as usize);
            for chunk in memory.as_chunks::<CHUNK>().0 {
                digests.push(self.store(chunk, &mut compressor, &mut packed)?);
            }
            // The receiver outlives all workers.
            let _ = results.send(Ok((first, digests)));
        }
        Ok(())
    }

    /// Stores one chunk unless it is all zeros or known.
    fn store(
        &self,
        chunk: &ChunkBuffer,
        compressor: &mut zstd::bulk::Compressor<'_>,
        packed: &mut [u8],
    ) -> Result<Option<Digest>, Error> {
        static ZEROS: ChunkBuffer = [0; CHUNK];
        if *chunk == ZEROS {
            return Ok(None);
        }
        let digest = Digest::of(chunk);
        if !self.seen.lock().expect("no worker panics with it held").insert(digest) {
            return Ok(Some(digest));
        }
        let length = compressor
            .compress_to_buffer(chunk, packed)
            .map_err(|source| Error::Compressor { level: self.level, source })?;
        let (parent, name) = chunk_path(&digest);
        let mut file = self.create_chunk(&parent, &name).map_err(io_error("create", &name))?;
        file.write_all(&packed[..length]).map_err(io_error("write", &name))?;
        self.stored_bytes.fetch_add(length as u64, Ordering::Relaxed);
        Ok(Some(digest))
    }

    fn create_chunk(&self, parent: &str, name: &str) -> io::Result<File> {
        match self.dir.create_file(name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.dir.create_dir(parent)?;
                self.dir.create_file(name)
            }
            result => result,
        }
    }
}

/// Directory and name of a chunk's file. Made from the digest's own hex digits only.
pub(super) fn chunk_path(digest: &Digest) -> (String, String) {
    let hex = digest.to_string();
    let parent = format!("{}/{}", file::CHUNKS, &hex[..2]);
    let name = iter::once(parent.as_str()).chain(["/", &hex, ".zst"]).collect();
    (parent, name)
}

const _: () =
    assert!(LOW_RAM_END.is_multiple_of(BATCH * CHUNK as u64), "no read crosses the hole in guest memory");

#[cfg(test)]
mod tests;
