//! Lazy loading: the same memory as when all is loaded first, and every page read once for all forks.

use std::fs;

use forkling_fixtures::null_guest;
use forkling_tests::{
    daemon::{Daemon, Settings},
    image::{Image, checksum_on_disk},
    spec,
};
use forkling_vmm::snapshot::Snapshot;

/// Guest-physical address at which the null guest's program is loaded.
const PROGRAM: u64 = 1 << 20;

/// Bytes of noise behind the program: memory that does not compress.
const NOISE: usize = 900 << 10;

fn noise() -> Vec<u8> {
    let mut bytes = vec![0; NOISE];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

/// Bytes that a process has read so far, from files and sockets.
fn bytes_read(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/io")).expect("I/O counters");
    let line = text.lines().find_map(|line| line.strip_prefix("rchar: ")).expect("rchar");
    line.parse().expect("a number")
}

#[test]
fn lazy_is_eager_and_each_page_is_read_once() {
    let settings = Settings::default();
    let noise = noise();
    fs::write(settings.null_guest(), [null_guest::PROGRAM, &noise].concat()).unwrap();
    let daemon = settings.start();
    assert!(daemon.health().lazy_loading, "this host should load lazily: {}", daemon.log());
    daemon.build(&spec::null("noise", &settings.null_guest())).outcome.unwrap();
    drop(daemon);
    let directory = settings.snapshot("noise");
    let expected = checksum_on_disk(&directory);
    let stored = Snapshot::open(&directory).unwrap().manifest().image.stored_bytes;
    assert!(stored > NOISE as u64);

    let lazy = settings.start();
    let before = bytes_read(lazy.pid());
    let forks = lazy.forks("noise", 16);
    lazy.wait_complete("noise");
    let read = bytes_read(lazy.pid()) - before;
    println!("{read} bytes read of {stored} stored, for 16 forks");
    assert!(read < stored + stored / 2, "{read} bytes were read for {stored} stored");
    compare(&lazy, expected, &forks.iter().map(|fork| fork.pid.unwrap()).collect::<Vec<_>>(), &noise);
    drop(lazy);

    let eager = settings.clone().arg("--eager").start();
    assert!(!eager.health().lazy_loading);
    let forks = eager.forks("noise", 2);
    compare(&eager, expected, &forks.iter().map(|fork| fork.pid.unwrap()).collect::<Vec<_>>(), &noise);
}

fn compare(daemon: &Daemon, expected: [u8; 32], forks: &[i32], noise: &[u8]) {
    assert_eq!(Image::of(daemon.zygote("noise")).checksum(), expected);
    for &fork in forks {
        let mut seen = vec![0; NOISE];
        Image::of(fork).private(PROGRAM + null_guest::PROGRAM.len() as u64, &mut seen);
        assert!(seen == noise, "fork {fork} sees other bytes than were saved");
    }
}
