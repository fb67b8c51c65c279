use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::{ChunkStore, Sharing};
use crate::snapshot::fixture::{self, UNIQUE_CHUNKS};
use crate::snapshot::write::chunk_path;
use crate::snapshot::{Error, Snapshot};

/// A store and snapshots of the same memory beside one another.
struct Bench {
    dir: tempfile::TempDir,
    store: ChunkStore,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = ChunkStore::open(dir.path()).unwrap();
        Self { dir, store }
    }

    fn snapshot(&self, name: &str) -> Snapshot {
        let path = self.path(name);
        fs::create_dir(&path).unwrap();
        fixture::write(&path);
        Snapshot::open(&path).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn stored(&self) -> usize {
        ChunkStore::chunks_of(self.dir.path()).len()
    }
}

fn links(snapshot: &Snapshot, path: &Path) -> Vec<u64> {
    let count = |digest| fs::metadata(path.join(chunk_path(digest).1)).unwrap().nlink();
    snapshot.index().contents().iter().map(count).collect()
}

#[test]
fn equal_chunks_are_on_disk_once() {
    let bench = Bench::new();
    let (first, second) = (bench.snapshot("first"), bench.snapshot("second"));
    let sharing = bench.store.share(&first).unwrap();
    assert_eq!(sharing, Sharing { added: UNIQUE_CHUNKS, ..Sharing::default() });
    let sharing = bench.store.share(&second).unwrap();
    assert_eq!((sharing.found, sharing.added, sharing.alone), (UNIQUE_CHUNKS, 0, 0));
    assert_eq!(sharing.found_bytes, first.manifest().image.stored_bytes);
    assert!(links(&first, &bench.path("first")).iter().all(|&links| links == 3));
    first.verify().unwrap();
    second.verify().unwrap();
    // Once more: nothing is left to do.
    assert_eq!(bench.store.share(&second).unwrap(), Sharing::default());
}

#[test]
fn removing_a_snapshot_leaves_the_others_whole() {
    let bench = Bench::new();
    let (first, second) = (bench.snapshot("first"), bench.snapshot("second"));
    bench.store.share(&first).unwrap();
    bench.store.share(&second).unwrap();
    let chunks = ChunkStore::chunks_of(&bench.path("first"));
    assert_eq!(chunks.len() as u64, UNIQUE_CHUNKS);
    fs::remove_dir_all(bench.path("first")).unwrap();
    bench.store.release(&chunks);
    assert_eq!(bench.stored() as u64, UNIQUE_CHUNKS);
    second.verify().unwrap();
    fs::remove_dir_all(bench.path("second")).unwrap();
    bench.store.release(&chunks);
    assert_eq!(bench.stored(), 0);
}

#[test]
fn what_no_snapshot_has_is_swept_and_nothing_else() {
    let bench = Bench::new();
    let (kept, lost) = (bench.snapshot("kept"), bench.snapshot("lost"));
    bench.store.share(&lost).unwrap();
    assert_eq!(bench.store.sweep(), 0);
    fs::remove_dir_all(bench.path("lost")).unwrap();
    bench.store.share(&kept).unwrap();
    assert_eq!(bench.store.sweep(), 0);
    fs::remove_dir_all(bench.path("kept")).unwrap();
    assert_eq!(bench.store.sweep(), UNIQUE_CHUNKS);
    assert_eq!(bench.stored(), 0);
}

/// The name of a chunk is no proof of what is in the file.
#[test]
fn a_damaged_chunk_does_not_get_in() {
    let bench = Bench::new();
    let (bad, good) = (bench.snapshot("bad"), bench.snapshot("good"));
    let (_, name) = chunk_path(&bad.index().contents()[5]);
    fs::write(bench.path("bad").join(&name), "poison").unwrap();
    assert!(matches!(bench.store.share(&bad), Err(Error::Damaged { .. })));
    bench.store.share(&good).unwrap();
    good.verify().unwrap();
}

/// A file that a crash left in the store, without a snapshot that has it, was perhaps never written to the disk.
#[test]
fn an_unused_file_of_the_store_is_not_believed() {
    let bench = Bench::new();
    let snapshot = bench.snapshot("a");
    let (parent, name) = chunk_path(&snapshot.index().contents()[0]);
    fs::create_dir_all(bench.dir.path().join(&parent)).unwrap();
    fs::write(bench.dir.path().join(&name), "").unwrap();
    fs::write(bench.dir.path().join(format!("{name}.new")), "half").unwrap();
    fs::write(bench.path("a").join(&parent).join(".new"), "half").unwrap();
    assert_eq!(bench.store.share(&snapshot).unwrap().added, UNIQUE_CHUNKS);
    snapshot.verify().unwrap();
    assert!(!bench.path("a").join(&parent).join(".new").exists());
}

/// Who wrote the snapshot may still have its files open.
#[test]
fn files_of_the_store_are_the_stores_own() {
    let bench = Bench::new();
    let snapshot = bench.snapshot("a");
    let (_, name) = chunk_path(&snapshot.index().contents()[0]);
    let path = bench.path("a").join(name);
    let open = fs::File::options().write(true).open(&path).unwrap();
    bench.store.share(&snapshot).unwrap();
    open.set_len(0).unwrap();
    snapshot.verify().unwrap();
}
