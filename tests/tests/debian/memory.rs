//! What an idle fork costs the host.

use std::time::Duration;

use forkling_daemon::api::types::ForkMemory;
use forkling_tests::{daemon::Daemon, eventually, proc};

use crate::guest;

const FORKS: u32 = 32;

/// Most memory of one idle fork that has answered a command, in bytes.
const LIMIT: u64 = 8 << 20;

fn available() -> u64 {
    proc::kib_field("/proc/meminfo", "MemAvailable").expect("Linux says what is available")
}

#[test]
fn an_idle_fork_costs_at_most_eight_mib() {
    let daemon = guest::daemon();
    let warm = daemon.fork(guest::ONE);
    daemon.sh(&warm.id, "true");
    daemon.wait_complete(guest::ONE);
    let before = available();
    for _ in 0..FORKS / 8 {
        for fork in guest::forks(&daemon, guest::ONE, 8) {
            daemon.sh(&fork.id, "true");
        }
    }
    let each = before.saturating_sub(available()) / u64::from(FORKS);
    println!("memory: {:.2} MiB for an idle fork", each as f64 / f64::from(1 << 20));
    assert!(each <= LIMIT, "{each} bytes for an idle fork");
}

#[test]
fn a_fork_at_rest_gives_back_what_is_equal_to_its_template_again() {
    const PATIENCE: Duration = Duration::from_secs(30);
    /// Less than what is equal again after one command, some 150 KiB.
    const MUCH: u64 = 100 << 10;
    let daemon = guest::settings().arg("--trim-after").arg("3").start();
    guest::ensure(&daemon, guest::ONE);
    let fork = daemon.fork(guest::ONE);
    daemon.wait_complete(guest::ONE);
    daemon.kill(&fork.id).unwrap();
    let fork = daemon.fork(guest::ONE);
    let private = |daemon: &Daemon| {
        let memory: ForkMemory = daemon.call("GET", &format!("/v1/forks/{}/memory", fork.id), None).unwrap();
        memory.private_bytes
    };
    let sum = "sha256sum /dev/shm/blob | cut -c1-64";
    let digest = daemon.sh(&fork.id, &format!("head -c 1000000 /dev/urandom > /dev/shm/blob; {sum}"));
    // It is trimmed again each time that it comes to rest.
    for _ in 0..3 {
        let before = private(&daemon);
        eventually(PATIENCE, "the fork gives memory back", || {
            let now = private(&daemon);
            if now + MUCH < before { Ok(()) } else { Err(format!("{before} bytes, now {now}")) }
        });
        assert_eq!(daemon.sh(&fork.id, sum), digest);
    }
}
