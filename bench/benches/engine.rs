//! The engine alone, on this host's KVM with the null guest: making a parked fork, activating it, and both.

use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use forkling_fixtures::engine::{Fork, Zygote, build_null};
use forkling_proto::mailbox::Header;
use forkling_tests::vmm_program;

const MEMORY_MIB: u32 = 256;

fn activate(fork: &Fork, nonce: u64) {
    let header =
        Header { generation: nonce, nonce, param: 1, wall_clock_ns: 1, entropy: [0; 64], prepare: false };
    fork.activate(&header).expect("the null guest acknowledges");
}

/// Times `step` on a parked fork; what comes before and after is left out.
fn on_parked(zygote: &mut Zygote, rounds: u64, step: impl Fn(&Fork, u64)) -> Duration {
    (1..=rounds)
        .map(|nonce| {
            let fork = zygote.park().expect("a fork parks");
            let began = Instant::now();
            step(&fork, nonce);
            began.elapsed()
        })
        .sum()
}

fn engine(criterion: &mut Criterion) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    build_null(&vmm_program(), MEMORY_MIB, directory.path()).expect("the null guest is built");
    let mut zygote = Zygote::load(&vmm_program(), directory.path()).expect("its snapshot loads");
    let mut group = criterion.benchmark_group("null guest, 256 MiB");
    group.sample_size(50);
    group.bench_function("park", |bencher| {
        bencher.iter_custom(|rounds| {
            let park = |_| {
                let began = Instant::now();
                let fork = zygote.park().expect("a fork parks");
                let took = began.elapsed();
                drop(fork);
                took
            };
            (0..rounds).map(park).sum()
        });
    });
    group.bench_function("activate to acknowledgement", |bencher| {
        bencher.iter_custom(|rounds| on_parked(&mut zygote, rounds, activate));
    });
    group.finish();
}

criterion_group!(benches, engine);
criterion_main!(benches);
