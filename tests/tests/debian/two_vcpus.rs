//! The same with two vCPUs.

use crate::guest::{self, TWO, Witness};

/// Goes back and forth between the CPUs and compares their clocks.
const CLOCKS: &str = "import os, time
last = time.monotonic_ns()
for turn in range(200):
    os.sched_setaffinity(0, {turn % 2})
    now = time.monotonic_ns()
    assert now >= last, (turn, last, now)
    last = now
print(len(os.sched_getaffinity(os.getppid())))";

#[test]
fn forks_with_two_vcpus() {
    let daemon = guest::daemon_with(TWO);
    let forks = guest::forks(&daemon, TWO, 3);
    let seen: Vec<_> = forks.iter().map(|fork| Witness::ask(&daemon, &fork.id)).collect();
    for (fork, witness) in forks.iter().zip(&seen) {
        assert_eq!(witness.hostname, fork.hostname);
        assert_eq!(witness.secret, seen[0].secret);
        assert!(witness.monotonic.is_sorted(), "{:?}", witness.monotonic);
    }
    assert_ne!(seen[0].token, seen[1].token);
    assert_ne!(seen[1].getrandom, seen[2].getrandom);
    let id = &forks[0].id;
    assert_eq!(
        daemon.sh(id, "nproc; for cpu in 0 1; do taskset -c $cpu sh -c 'echo $((6 * 7))'; done"),
        "2\n42\n42"
    );
    assert_eq!(daemon.sh(id, &format!("python3 -c '{CLOCKS}'")), "2");
    assert_eq!(daemon.sh(&forks[2].id, "echo alive"), "alive");
}
