//! Parts of the path alone: messages, chunks, and pages put into an image.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use forkling_proto::mailbox::{self, Header, Identity};
use forkling_vmm::{
    protocol::{self, ToFork},
    snapshot::{CHUNK, ChunkKind, Compression, Snapshot, SnapshotWriter},
    sys::{memfd::SealedMemory, uffd::Inserter},
};
use tempfile::TempDir;

/// Memory that is compressed at once, in bytes.
const MEMORY: usize = 4 << 20;

fn identity() -> (Header, Identity) {
    let header =
        Header { generation: 7, nonce: 8, param: 0, wall_clock_ns: 9, entropy: [3; 64], prepare: false };
    let identity = Identity {
        id: "f-0123456789abc".into(),
        hostname: "f-0123456789abc".into(),
        machine_id: "0123456789abcdef0123456789abcdef".into(),
        env: vec![("TASK".into(), "42".into())],
        network: None,
    };
    (header, identity)
}

/// What the daemon does for an activation, and what fork and guest do with it.
fn messages(criterion: &mut Criterion) {
    let (header, identity) = identity();
    let encode = || {
        let mailbox = mailbox::encode(black_box(&header), black_box(&identity)).expect("it fits");
        protocol::encode(&ToFork::Activate { mailbox, advance_monotonic: false, plugged: true })
            .expect("it fits")
    };
    let message = encode();
    let mut group = criterion.benchmark_group("activation message");
    group.bench_function("encode", |bencher| bencher.iter(encode));
    group.bench_function("decode", |bencher| {
        bencher.iter(|| {
            let message: ToFork = protocol::decode(black_box(&message)).expect("it is whole");
            let ToFork::Activate { mailbox, .. } = message else { panic!("it is an activation") };
            mailbox::decode(&mailbox).expect("it is whole")
        });
    });
    group.finish();
}

/// Memory that compresses about as that of a guest: words that repeat, and some that do not.
fn memory() -> Vec<u8> {
    let mut state = 1_u64;
    let mut word = |at: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let value = if at.is_multiple_of(4) { state } else { (at as u64 / 64) << 32 };
        value.to_le_bytes()
    };
    (0..MEMORY / 8).flat_map(&mut word).collect()
}

fn write(memory: &[u8], directory: &TempDir, threads: usize) {
    let writer = SnapshotWriter::create(directory.path()).expect("an empty directory");
    let read = |offset: u64, buffer: &mut [u8]| {
        let at = offset as usize;
        buffer.copy_from_slice(&memory[at..at + buffer.len()]);
        Ok(())
    };
    let compression = Compression { level: 1, threads };
    writer.write_image(memory.len() as u64, compression, read, |_, _| {}).expect("it can be written");
}

/// Chunks into a snapshot and out of it, checksums included.
fn codec(criterion: &mut Criterion) {
    let memory = memory();
    let mut group = criterion.benchmark_group("codec, one thread");
    group.sample_size(20).throughput(Throughput::Bytes(MEMORY as u64));
    group.bench_function("compress and write 4 MiB", |bencher| {
        let fresh = || tempfile::tempdir().expect("a temporary directory");
        bencher.iter_batched(
            fresh,
            |directory| {
                write(&memory, &directory, 1);
                directory
            },
            BatchSize::PerIteration,
        );
    });
    let directory = tempfile::tempdir().expect("a temporary directory");
    forkling_fixtures::engine::build_null(&forkling_tests::vmm_program(), 64, directory.path())
        .expect("the null guest is built");
    let snapshot = Snapshot::open(directory.path()).expect("it is whole");
    let chunks = snapshot.index().chunks();
    let data = (0..chunks).find(|&chunk| snapshot.index().get(chunk).is_some()).expect("it has memory");
    let mut reader = snapshot.chunk_reader().expect("buffers");
    let mut buffer = Box::new([0; CHUNK]);
    group.throughput(Throughput::Bytes(CHUNK as u64));
    group.bench_function("read, decompress and verify a chunk", |bencher| {
        bencher.iter(|| {
            let kind = reader.read(&snapshot, black_box(data), &mut buffer).expect("it is whole");
            assert_eq!(kind, ChunkKind::Data);
        });
    });
    group.finish();
}

/// Pages put into an image that forks have mapped.
fn insert(criterion: &mut Criterion) {
    let pages = vec![7; CHUNK];
    let mut group = criterion.benchmark_group("pager");
    group.throughput(Throughput::Bytes(CHUNK as u64));
    group.bench_function("insert a chunk", |bencher| {
        let fresh = || {
            let memory = SealedMemory::new("bench", CHUNK as u64).expect("a memfd");
            Inserter::new(memory).unwrap_or_else(|(_, error)| panic!("userfaultfd: {error}"))
        };
        bencher.iter_batched(
            fresh,
            |inserter| {
                assert_eq!(inserter.insert(0, &pages).expect("it is inside"), 0);
                inserter
            },
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

criterion_group!(benches, messages, codec, insert);
criterion_main!(benches);
