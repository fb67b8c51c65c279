//! What an idle fork costs the host.

use forkling_tests::proc;

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
