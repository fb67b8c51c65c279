use std::fs;
use std::io;
use std::path::Path;

use super::super::{CHUNK, Error, Snapshot, file, fixture};
use super::{Compression, SnapshotWriter, commit};

const PLAIN: Compression = Compression { level: 1, threads: 2 };

#[test]
fn equal_chunks_are_stored_once_and_zeros_never() {
    let dir = tempfile::tempdir().unwrap();
    let image = fixture::write(dir.path()).image;
    assert_eq!(image.chunks, fixture::MEMORY / CHUNK as u64);
    assert_eq!(image.data_chunks, fixture::DATA_CHUNKS);
    assert_eq!(image.unique_chunks, fixture::UNIQUE_CHUNKS);
    let files = chunk_files(dir.path());
    assert_eq!(files.len() as u64, fixture::UNIQUE_CHUNKS);
    let bytes: u64 = files.iter().map(|path| fs::metadata(path).unwrap().len()).sum();
    assert_eq!(bytes, image.stored_bytes);
}

#[test]
fn what_is_written_does_not_depend_on_threads() {
    let write = |threads| {
        let dir = tempfile::tempdir().unwrap();
        let writer = SnapshotWriter::create(dir.path()).unwrap();
        writer
            .write_image(fixture::MEMORY, Compression { level: 1, threads }, fixture::read, |_, _| ())
            .unwrap()
    };
    assert_eq!(write(1), write(3));
}

#[test]
fn progress_reaches_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut seen = vec![];
    let writer = SnapshotWriter::create(dir.path()).unwrap();
    writer
        .write_image(fixture::MEMORY, PLAIN, fixture::read, |done, total| seen.push((done, total)))
        .unwrap();
    let total = fixture::MEMORY / CHUNK as u64;
    assert_eq!(seen.last(), Some(&(total, total)));
    assert!(seen.is_sorted());
}

#[test]
fn unreadable_memory_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let writer = SnapshotWriter::create(dir.path()).unwrap();
    let read = |offset: u64, _: &mut [u8]| {
        if offset >= 32 << 20 { Err(io::Error::other("gone")) } else { Ok(()) }
    };
    let error = writer.write_image(fixture::MEMORY, PLAIN, read, |_, _| ()).unwrap_err();
    assert!(matches!(error, Error::Memory { offset, .. } if offset >= 32 << 20), "{error}");
}

#[test]
fn refuses_a_directory_in_use() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(file::STATE), "{}").unwrap();
    assert!(matches!(SnapshotWriter::create(dir.path()), Err(Error::NotEmpty { .. })));
}

#[test]
fn an_unfinished_snapshot_cannot_be_opened() {
    let dir = tempfile::tempdir().unwrap();
    let writer = SnapshotWriter::create(dir.path()).unwrap();
    writer.write_state(&"state").unwrap();
    let error = Snapshot::open(dir.path()).err().unwrap();
    assert!(matches!(&error, Error::Missing { file } if file == file::MANIFEST), "{error}");
}

#[test]
fn commit_renames_and_never_replaces() {
    let parent = tempfile::tempdir().unwrap();
    let [building, name] = ["building", "name"].map(|entry| parent.path().join(entry));
    fs::create_dir(&building).unwrap();
    fixture::write(&building);
    commit(&building, &name).unwrap();
    assert!(!building.exists());
    Snapshot::open(&name).unwrap().verify().unwrap();

    fs::create_dir(&building).unwrap();
    fixture::write(&building);
    let error = commit(&building, &name).unwrap_err();
    assert!(
        matches!(&error, Error::Io { source, .. } if source.kind() == io::ErrorKind::AlreadyExists),
        "{error}"
    );
}

#[test]
fn a_root_image_is_adopted_or_copied() {
    let bytes = vec![7; 100_000];
    let source = tempfile::NamedTempFile::new().unwrap();
    fs::write(source.path(), &bytes).unwrap();

    let copied = tempfile::tempdir().unwrap();
    let writer = SnapshotWriter::create(copied.path()).unwrap();
    let sum = writer.copy_root(source.as_file()).unwrap();
    assert_eq!(fs::read(copied.path().join(file::ROOT)).unwrap(), bytes);

    let adopted = tempfile::tempdir().unwrap();
    fs::write(adopted.path().join(file::ROOT), &bytes).unwrap();
    let writer = SnapshotWriter::create(adopted.path()).unwrap();
    assert_eq!(writer.adopt_root().unwrap(), sum);
}

fn chunk_files(dir: &Path) -> Vec<std::path::PathBuf> {
    let parents = fs::read_dir(dir.join(file::CHUNKS)).unwrap();
    parents
        .flat_map(|parent| fs::read_dir(parent.unwrap().path()).unwrap())
        .map(|e| e.unwrap().path())
        .collect()
}
