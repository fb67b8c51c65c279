//! A small snapshot for tests: random, repeated, sparse and zero chunks.

use std::io;
use std::path::Path;

use super::{CHUNK, Compression, FORMAT, Forkpoint, HostTags, Index, Manifest, SnapshotWriter};
use crate::protocol::{CpuTemplate, Payload};

pub(crate) const MEMORY: u64 = 64 << 20;
pub(crate) const DATA_CHUNKS: u64 = 300;
pub(crate) const UNIQUE_CHUNKS: u64 = 201;
pub(crate) const STATE: &str = "registers and all";

/// Fills `buffer` with the memory at `offset`.
pub(crate) fn read(offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    for (n, chunk) in buffer.chunks_mut(CHUNK).enumerate() {
        fill(offset / CHUNK as u64 + n as u64, chunk);
    }
    Ok(())
}

/// Chunks 0..200 are random, 200..300 all equal, 300.. zero.
pub(crate) fn fill(chunk: u64, buffer: &mut [u8]) {
    match chunk {
        0..200 => {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&chunk.to_le_bytes());
            hasher.finalize_xof().fill(buffer);
        }
        200..300 => {
            buffer.fill(0);
            buffer[CHUNK - 1] = 1;
        }
        _ => buffer.fill(0),
    }
}

/// Writes the snapshot and returns its manifest.
pub(crate) fn write(dir: &Path) -> Manifest {
    let writer = SnapshotWriter::create(dir).unwrap();
    let compression = Compression { level: 1, threads: 0 };
    let image = writer.write_image(MEMORY, compression, read, |_, _| ()).unwrap();
    let state = writer.write_state(&STATE).unwrap();
    let root = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(root.path(), [3; 10_000]).unwrap();
    let manifest = Manifest {
        format: FORMAT,
        tool: "test".into(),
        created: 0,
        host: HostTags { arch: "x86_64".into(), cpu_vendor: "".into(), kernel: "".into(), kvm: "".into() },
        memory_bytes: MEMORY,
        vcpus: 1,
        cpu: CpuTemplate::Host,
        payload: Payload::Null,
        forkpoint: Forkpoint { mailbox_pages: vec![0x1000], mailbox_bytes: 4096 },
        state,
        root: Some(writer.copy_root(root.as_file()).unwrap()),
        image,
    };
    writer.finish(&manifest).unwrap();
    manifest
}

/// Writes the manifest again after a test changed it.
pub(crate) fn rewrite_manifest(dir: &Path, text: &[u8]) {
    std::fs::write(dir.join(super::file::MANIFEST), text).unwrap();
    std::fs::write(dir.join(super::file::MANIFEST_SUM), super::write::manifest_sum(text)).unwrap();
}

/// Replaces the index and its checksum in the manifest.
pub(crate) fn rewrite_index(dir: &Path, manifest: &Manifest, index: &Index) {
    let bytes = index.encode();
    std::fs::write(dir.join(super::file::INDEX), &bytes).unwrap();
    let mut manifest = manifest.clone();
    manifest.image.index = super::FileSum::of_bytes(&bytes);
    rewrite_manifest(dir, &manifest.encode());
}
