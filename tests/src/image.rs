//! A template's memory as seen from outside: in its zygote's memfd, in the private mapping of a fork, and on disk.

use std::{fs::File, io::Read, os::unix::fs::FileExt, path::PathBuf};

use forkling_vmm::snapshot::{CHUNK, ChunkKind, ChunkReader, Snapshot};

use crate::proc;

/// The image that a process maps: file behind it and start of the mapping.
#[derive(Debug)]
pub struct Image {
    file: PathBuf,
    /// Host-virtual start of the guest's memory.
    pub start: u64,
    /// Its length in bytes.
    pub len: u64,
    pid: i32,
}

impl Image {
    /// The image that zygote or fork `pid` maps: its longest mapping of a memfd.
    ///
    /// # Panics
    /// When it maps none.
    pub fn of(pid: i32) -> Self {
        let maps = proc::mappings(pid);
        let ranges = maps.iter().filter(|line| line.contains("/memfd:")).map(|line| range(line));
        let (start, end) = merged(ranges.collect());
        let (_, first_end) =
            maps.iter().map(|line| range(line)).find(|(from, _)| *from == start).expect("just found");
        let file = format!("/proc/{pid}/map_files/{start:x}-{first_end:x}");
        Self { file: file.into(), start, len: end - start, pid }
    }

    /// BLAKE3 of the shared image, holes as zeros.
    pub fn checksum(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        let mut file =
            File::open(&self.file).unwrap_or_else(|error| panic!("{}: {error}", self.file.display()));
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer).expect("memfds can be read") {
                0 => return *hasher.finalize().as_bytes(),
                count => hasher.update(&buffer[..count]),
            };
        }
    }

    /// Bytes of the shared image at a guest-physical address below 3 GiB.
    pub fn shared(&self, address: u64, buffer: &mut [u8]) {
        let file = File::open(&self.file).expect("a mapped file can be opened");
        file.read_exact_at(buffer, address).expect("within the image");
    }

    /// Bytes as the process itself sees them.
    pub fn private(&self, address: u64, buffer: &mut [u8]) {
        proc::read_memory(self.pid, self.start + address, buffer).expect("memory of our own descendant");
    }
}

/// BLAKE3 of the memory in a snapshot directory.
pub fn checksum_on_disk(directory: &std::path::Path) -> [u8; 32] {
    let snapshot = Snapshot::open(directory).expect("a valid snapshot");
    let mut reader = ChunkReader::new().expect("a decompressor");
    let mut buffer = [0; CHUNK];
    let mut hasher = blake3::Hasher::new();
    for chunk in 0..snapshot.index().chunks() {
        if reader.read(&snapshot, chunk, &mut buffer).expect("a valid chunk") == ChunkKind::Zero {
            buffer.fill(0);
        }
        hasher.update(&buffer);
    }
    *hasher.finalize().as_bytes()
}

fn range(line: &str) -> (u64, u64) {
    let (start, rest) = line.split_once('-').expect("a range");
    let end = rest.split(' ').next().expect("an end");
    let hex = |text| u64::from_str_radix(text, 16).expect("a number");
    (hex(start), hex(end))
}

/// The longest run of adjacent ranges: a mapping is split where its protection or its advice differs.
fn merged(ranges: Vec<(u64, u64)>) -> (u64, u64) {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for (start, end) in ranges {
        match runs.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => runs.push((start, end)),
        }
    }
    runs.into_iter().max_by_key(|(start, end)| end - start).expect("a memfd is mapped")
}
