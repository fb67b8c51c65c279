use std::fs;
use std::path::{Path, PathBuf};

use super::super::{CHUNK, Damage, Digest, Error, Index, Manifest, file, fixture};
use super::{ChunkKind, Snapshot};

struct Written {
    dir: tempfile::TempDir,
    manifest: Manifest,
}

impl Written {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let manifest = fixture::write(dir.path());
        Self { dir, manifest }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn open(&self) -> Result<Snapshot, Error> {
        Snapshot::open(self.dir.path())
    }

    /// Opens and reads everything.
    fn verify(&self) -> Result<(), Error> {
        self.open()?.verify()
    }

    /// Changes a file, expects an error, and changes it back.
    fn with(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> Error {
        let good = fs::read(self.path(name)).unwrap();
        let mut bytes = good.clone();
        change(&mut bytes);
        fs::write(self.path(name), &bytes).unwrap();
        let error = self.verify().expect_err(name);
        fs::write(self.path(name), &good).unwrap();
        error
    }

    fn chunk_name(&self, chunk: u64) -> String {
        let hex = self.open().unwrap().index().get(chunk).unwrap().to_string();
        format!("{}/{}/{hex}.zst", file::CHUNKS, &hex[..2])
    }
}

fn damage_of(error: &Error, name: &str) -> Damage {
    match error {
        Error::Damaged { file, damage } if file == name => *damage,
        _ => panic!("{name}: {error}"),
    }
}

#[test]
fn everything_reads_back_as_written() {
    let written = Written::new();
    let snapshot = written.open().unwrap();
    snapshot.verify().unwrap();
    assert_eq!(*snapshot.manifest(), written.manifest);
    assert_eq!(snapshot.state::<String>().unwrap(), fixture::STATE);
    assert_eq!(snapshot.open_root().unwrap().unwrap().metadata().unwrap().len(), 10_000);

    let mut reader = snapshot.chunk_reader().unwrap();
    let (mut found, mut expected) = (Box::new([0; CHUNK]), vec![0; CHUNK]);
    for chunk in 0..snapshot.index().chunks() {
        found.fill(0);
        let kind = reader.read(&snapshot, chunk, &mut found).unwrap();
        assert_eq!(kind == ChunkKind::Data, chunk < fixture::DATA_CHUNKS);
        fixture::fill(chunk, &mut expected);
        assert!(found[..] == expected[..], "chunk {chunk}");
    }
}

#[test]
fn nothing_in_it_names_where_it_was_written() {
    let written = Written::new();
    for name in [file::MANIFEST, file::STATE, file::MANIFEST_SUM] {
        let text = fs::read_to_string(written.path(name)).unwrap();
        assert!(!text.contains(written.dir.path().to_str().unwrap()), "{text}");
    }
    let moved = tempfile::tempdir().unwrap();
    fs::rename(written.dir.path(), moved.path().join("elsewhere")).unwrap();
    Snapshot::open(&moved.path().join("elsewhere")).unwrap().verify().unwrap();
}

#[test]
fn truncation_is_found_in_every_file() {
    let written = Written::new();
    for name in [file::STATE, file::INDEX, file::ROOT] {
        let error = written.with(name, |bytes| bytes.truncate(bytes.len() - 1));
        assert!(matches!(damage_of(&error, name), Damage::Length { .. }), "{error}");
        let error = written.with(name, |bytes| bytes.push(0));
        assert!(matches!(damage_of(&error, name), Damage::Length { .. }), "{error}");
    }
    let error = written.with(file::MANIFEST, |bytes| bytes.truncate(100));
    assert_eq!(damage_of(&error, file::MANIFEST), Damage::Checksum);
    let name = written.chunk_name(7);
    for keep in [0, 1, 100, 60_000] {
        let error = written.with(&name, |bytes| bytes.truncate(keep));
        assert_eq!(damage_of(&error, &name), Damage::Compression);
    }
    written.verify().unwrap();
}

#[test]
fn a_flipped_bit_is_found_in_every_file() {
    let written = Written::new();
    let (random, repeated) = (written.chunk_name(7), written.chunk_name(250));
    for name in [file::STATE, file::INDEX, file::ROOT, file::MANIFEST, &random, &repeated] {
        let length = fs::metadata(written.path(name)).unwrap().len() as usize;
        for at in [0, length / 3, length / 2, length - 1] {
            let error = written.with(name, |bytes| bytes[at] ^= 4);
            assert!(matches!(damage_of(&error, name), Damage::Checksum | Damage::Compression), "{error}");
            assert!(error.is_snapshot_fault());
        }
    }
    let error = written.with(file::MANIFEST_SUM, |bytes| bytes[0] ^= 1);
    assert_eq!(damage_of(&error, file::MANIFEST), Damage::Checksum);
    written.verify().unwrap();
}

#[test]
fn a_missing_file_is_named() {
    let written = Written::new();
    let chunk = written.chunk_name(0);
    for name in [file::MANIFEST, file::MANIFEST_SUM, file::STATE, file::INDEX, file::ROOT, &chunk] {
        fs::rename(written.path(name), written.path("aside")).unwrap();
        let error = written.verify().unwrap_err();
        assert!(matches!(&error, Error::Missing { file } if file == name), "{error}");
        fs::rename(written.path("aside"), written.path(name)).unwrap();
    }
}

#[test]
fn another_format_is_refused_by_its_number_before_anything_else() {
    let written = Written::new();
    let error =
        written.with(file::MANIFEST, |bytes| *bytes = br#"{"format": 99, "all": "different"}"#.to_vec());
    assert!(matches!(error, Error::Format { found: 99 }), "{error}");
    assert!(error.to_string().contains("build the template again"), "{error}");
}

#[test]
fn an_unknown_field_is_refused() {
    let written = Written::new();
    let mut value = serde_json::to_value(&written.manifest).unwrap();
    value["extra"] = true.into();
    fixture::rewrite_manifest(written.dir.path(), &serde_json::to_vec(&value).unwrap());
    let error = written.verify().unwrap_err();
    assert!(matches!(&error, Error::Json { file: file::MANIFEST, .. }), "{error}");
    assert!(error.to_string().contains("extra"), "{error}");
}

#[test]
fn a_hash_with_a_path_is_refused() {
    let written = Written::new();
    let mut value = serde_json::to_value(&written.manifest).unwrap();
    value["image"]["index"]["blake3"] = "../../../../etc/passwd".into();
    fixture::rewrite_manifest(written.dir.path(), &serde_json::to_vec(&value).unwrap());
    let error = written.verify().unwrap_err();
    assert!(error.to_string().contains("64 lower-case hex digits"), "{error}");
}

#[test]
fn an_index_that_contradicts_the_manifest_is_refused() {
    let written = Written::new();
    let index = Index::new((0..1024_u32).map(|n| Some(Digest::of(&n.to_le_bytes()))));
    fixture::rewrite_index(written.dir.path(), &written.manifest, &index);
    let error = written.verify().unwrap_err();
    assert!(matches!(error, Error::OutOfRange { field: "image.index.length", .. }), "{error}");

    let index = Index::new(vec![None; 1024]);
    fixture::rewrite_index(written.dir.path(), &written.manifest, &index);
    let error = written.verify().unwrap_err();
    assert!(matches!(damage_of(&error, file::INDEX), Damage::Structure(_)), "{error}");
}

/// The file is valid and its content is another chunk's.
#[test]
fn an_exchanged_chunk_is_found() {
    let written = Written::new();
    let (one, other) = (written.chunk_name(1), written.chunk_name(2));
    let error = written.with(&one, |bytes| *bytes = fs::read(written.path(&other)).unwrap());
    assert_eq!(damage_of(&error, &one), Damage::Checksum);
}

#[test]
fn a_chunk_cannot_grow_past_its_buffer() {
    let written = Written::new();
    let name = written.chunk_name(3);
    for length in [CHUNK - 1, CHUNK + 1, 64 << 20] {
        let bomb = zstd::bulk::compress(&vec![0; length], 1).unwrap();
        let error = written.with(&name, |bytes| *bytes = bomb);
        assert_eq!(damage_of(&error, &name), Damage::Compression);
    }
}

#[test]
fn links_are_not_followed() {
    let written = Written::new();
    let name = written.chunk_name(5);
    let aside = written.path("aside");
    fs::rename(written.path(&name), &aside).unwrap();
    std::os::unix::fs::symlink(&aside, written.path(&name)).unwrap();
    let error = written.verify().unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
}

#[test]
fn a_missing_directory_is_named() {
    let error = Snapshot::open(Path::new("/nonexistent/template")).err().unwrap();
    assert!(error.to_string().contains("/nonexistent/template"), "{error}");
}
