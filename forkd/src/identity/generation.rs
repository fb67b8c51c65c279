//! Generations: a counter with a high-water mark on disk, taken in blocks, so that no activation waits for a disk.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{SystemTime, UNIX_EPOCH},
};

use crate::durable;

/// Generations promised to disk at a time: a crash skips at most so many, a disk is asked once in so many.
const BLOCK: u64 = 1 << 20;

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    next: AtomicU64,
    /// All generations below are promised on disk.
    promised: AtomicU64,
    extending: AtomicBool,
}

/// The source of generations of one state directory.
#[derive(Clone, Debug)]
pub struct Generations(Arc<Shared>);

impl Generations {
    /// Opens the mark in `path`. Without a usable one the counter starts at the seconds since 1970 times 2^20, which
    /// is beyond all that an earlier state directory of this host gave out.
    pub fn open(path: &Path) -> io::Result<Self> {
        let read = fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
        let next = read.filter(|&mark| mark > 0).unwrap_or_else(|| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            since.as_secs().max(1) * BLOCK
        });
        persist(path, next + BLOCK)?;
        Ok(Self(Arc::new(Shared {
            path: path.to_owned(),
            next: AtomicU64::new(next),
            promised: AtomicU64::new(next + BLOCK),
            extending: AtomicBool::new(false),
        })))
    }

    /// A generation that was never given out; `None` when the disk has not taken the next promise.
    pub fn next(&self) -> Option<u64> {
        let generation = self.0.next.fetch_add(1, Ordering::Relaxed);
        let promised = self.0.promised.load(Ordering::Acquire);
        if generation + BLOCK / 2 >= promised && !self.0.extending.swap(true, Ordering::AcqRel) {
            let shared = self.0.clone();
            thread::spawn(move || shared.extend());
        }
        (generation < promised).then_some(generation)
    }
}

impl Shared {
    fn extend(&self) {
        let target = self.promised.load(Ordering::Acquire).max(self.next.load(Ordering::Relaxed)) + BLOCK;
        match persist(&self.path, target) {
            Ok(()) => self.promised.store(target, Ordering::Release),
            Err(error) => {
                tracing::error!(%error, path = %self.path.display(), "cannot keep the generation mark")
            }
        }
        self.extending.store(false, Ordering::Release);
    }
}

fn persist(path: &Path, mark: u64) -> io::Result<()> {
    durable::replace(path, format!("{mark}\n").as_bytes())
}
