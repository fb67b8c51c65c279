use std::fs;
use std::path::Path;

use super::{MAX_PAGES, PackedPages, SEGMENT_PAGES};
use crate::snapshot::fixture::{self, DATA_CHUNKS};
use crate::snapshot::{AlignedChunk, CHUNK, ChunkBuffer, Error, Snapshot, WorkingSet, file};

const PAGE: usize = 4096;

fn expected(page: u32) -> Vec<u8> {
    let mut chunk = vec![0; CHUNK];
    fixture::fill(u64::from(page) / SEGMENT_PAGES as u64, &mut chunk);
    chunk[page as usize % SEGMENT_PAGES * PAGE..][..PAGE].to_vec()
}

fn write(dir: &Path, set: &WorkingSet) -> Snapshot {
    fixture::write(dir);
    set.write(dir).unwrap();
    Snapshot::open(dir).unwrap()
}

/// Reads all pages, past the page cache where the file system can, and then through it.
fn check(pages: &PackedPages) -> Vec<u32> {
    let mut unaligned = Box::new([0; CHUNK + 1]);
    let seen = check_with(pages, &mut AlignedChunk::zeroed());
    let skipped = usize::from(unaligned.as_ptr().addr().is_multiple_of(2));
    let buffer = (&mut unaligned[skipped..skipped + CHUNK]).try_into().unwrap();
    assert_eq!(check_with(pages, buffer), seen);
    seen
}

fn check_with(pages: &PackedPages, buffer: &mut ChunkBuffer) -> Vec<u32> {
    let mut seen = Vec::new();
    for segment in 0..pages.segments() {
        pages.read(segment, buffer).unwrap();
        for (at, &number) in pages.pages_of(segment).iter().enumerate() {
            assert!(buffer[at * PAGE..][..PAGE] == expected(number), "page {number}");
            seen.push(number);
        }
    }
    seen
}

#[test]
fn pages_lie_in_the_order_in_which_they_are_wanted() {
    let dir = tempfile::tempdir().unwrap();
    // Written ones first; those of zero chunks are left out.
    let zero = DATA_CHUNKS * SEGMENT_PAGES as u64;
    let snapshot = write(dir.path(), &WorkingSet::new((0..40).chain([zero, 3000]), [100, 50, zero + 1]));
    let pages = snapshot.working_pages().unwrap().unwrap();
    let order = [50, 100].into_iter().chain(0..40).chain([3000]);
    // What lies beside the written ones is wanted last.
    let beside = (48..64).chain(96..112).filter(|page| ![50, 100].contains(page));
    assert_eq!(check(&pages), order.chain(beside).collect::<Vec<u32>>());
    assert_eq!(pages.segments(), 5);
}

#[test]
fn what_is_wanted_first_comes_first_and_nothing_twice() {
    let dir = tempfile::tempdir().unwrap();
    let snapshot = write(dir.path(), &WorkingSet::default());
    let first = WorkingSet::new([30, 31], [7]);
    WorkingSet::new([5, 30, 31, 32], [7, 8]).write_by_stages(&[first], dir.path()).unwrap();
    let pages = snapshot.working_pages().unwrap().unwrap();
    let order = [7, 30, 31, 8, 5, 32].into_iter().chain((0..16).filter(|page| ![5, 7, 8].contains(page)));
    assert_eq!((check(&pages), pages.urgent_segments()), (order.collect(), 1));
    assert_eq!(pages.written(), [7], "what is written later is not urgent");
    WorkingSet::new(0..100, []).write_by_stages(&[WorkingSet::new(0..17, [])], dir.path()).unwrap();
    let pages = snapshot.working_pages().unwrap().unwrap();
    assert_eq!((pages.segments(), pages.urgent_segments()), (7, 2));
    WorkingSet::new(0..100, []).write(dir.path()).unwrap();
    assert_eq!(
        snapshot.working_pages().unwrap().unwrap().urgent_segments(),
        7,
        "all, if nothing else is said"
    );
}

#[test]
fn an_empty_or_huge_set_has_its_bounds() {
    let dir = tempfile::tempdir().unwrap();
    let snapshot = write(dir.path(), &WorkingSet::default());
    assert_eq!(snapshot.working_pages().unwrap().unwrap().segments(), 0);
    WorkingSet::new(0..4000, []).write(dir.path()).unwrap();
    assert_eq!(check(&snapshot.working_pages().unwrap().unwrap()).len(), MAX_PAGES);
    fs::remove_file(dir.path().join(file::WORKING_PAGES)).unwrap();
    assert!(snapshot.working_pages().unwrap().is_none());
}

#[test]
fn no_changed_byte_gets_through() {
    let dir = tempfile::tempdir().unwrap();
    let snapshot = write(dir.path(), &WorkingSet::new([1, 2, 700], [9]));
    let path = dir.path().join(file::WORKING_PAGES);
    let good = fs::read(&path).unwrap();
    let read = || -> Result<(), Error> {
        let pages = snapshot.working_pages()?.unwrap();
        (0..pages.segments()).try_for_each(|segment| pages.read(segment, &mut Box::new([0; CHUNK])))
    };
    let head = super::head_length(17);
    for at in (0..head).chain([4096, good.len() - 1]) {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        fs::write(&path, bad).unwrap();
        assert!(read().is_err(), "byte {at}");
    }
    for length in [0, 7, 50, head - 1, 4096, good.len() - 1] {
        fs::write(&path, &good[..length]).unwrap();
        assert!(read().is_err(), "cut at {length}");
    }
    fs::write(&path, &good).unwrap();
    read().unwrap();
}

#[test]
fn that_of_another_snapshot_is_refused() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let snapshot = write(dir.path(), &WorkingSet::new([1], []));
    let manifest = fixture::write(other.path());
    let mut index = snapshot.index().clone();
    index = crate::snapshot::Index::new((0..index.chunks()).map(|chunk| index.get(chunk.saturating_sub(1))));
    let mut manifest = manifest;
    manifest.image.data_chunks = index.data_chunks();
    manifest.image.unique_chunks = index.unique_chunks();
    fixture::rewrite_index(other.path(), &manifest, &index);
    fs::copy(dir.path().join(file::WORKING_PAGES), other.path().join(file::WORKING_PAGES)).unwrap();
    let refused = Snapshot::open(other.path()).unwrap().working_pages();
    assert!(matches!(&refused, Err(error) if error.to_string().contains("another snapshot")));
}
