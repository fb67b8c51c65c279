//! Lazy loading: the same memory as when all is loaded first, and every page read once for all forks.

use std::time::Instant;

use forkling_tests::image::{Image, checksum_on_disk};
use forkling_vmm::snapshot::Snapshot;

use crate::guest::{self, Witness};

/// Bytes that the daemon has read so far, from files and sockets.
fn bytes_read(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io")).expect("I/O counters");
    let line = text.lines().find_map(|line| line.strip_prefix("rchar: ")).expect("rchar");
    line.parse().expect("a number")
}

#[test]
fn lazy_is_eager_and_each_page_is_read_once() {
    let daemon = guest::daemon();
    let settings = daemon.settings.clone();
    drop(daemon);
    let directory = settings.snapshot(guest::ONE);
    let expected = checksum_on_disk(&directory);
    let stored = Snapshot::open(&directory).unwrap().manifest().image.stored_bytes;

    let lazy = settings.start();
    assert!(lazy.health().lazy_loading, "{}", lazy.log());
    let before = bytes_read(lazy.pid());
    let start = Instant::now();
    let forks = guest::forks(&lazy, guest::ONE, 8);
    let first = start.elapsed();
    let secrets: Vec<_> = forks.iter().map(|fork| Witness::ask(&lazy, &fork.id).secret).collect();
    lazy.wait_complete(guest::ONE);
    let read = bytes_read(lazy.pid()) - before;
    println!("lazy: 8 forks after {first:?}; {read} bytes read of {stored} stored");
    // The pages that forks are known to touch are kept a second time, at most 8 MiB of them, to be read first.
    let most = stored + stored / 4 + (9 << 20);
    assert!(read < most, "{read} bytes were read for {stored} stored");
    assert_eq!(Image::of(lazy.zygote(guest::ONE)).checksum(), expected);
    drop(lazy);

    let eager = settings.clone().arg("--eager").start();
    assert!(!eager.health().lazy_loading);
    let fork = eager.fork(guest::ONE);
    assert_eq!(Image::of(eager.zygote(guest::ONE)).checksum(), expected);
    let secret = Witness::ask(&eager, &fork.id).secret;
    assert!(secrets.iter().all(|lazy| *lazy == secret));
}
