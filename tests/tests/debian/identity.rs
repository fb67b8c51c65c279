//! Sixty-four forks of one template share its past and nothing else.

use std::{collections::HashSet, time::SystemTime};

use forkling_daemon::api::types::ForkInfo;

use crate::guest::{self, Witness};

const FORKS: u32 = 64;

/// How far a fork's wall clock may be off the host's, in seconds.
const CLOCK: f64 = 0.050;

fn unix_now() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs_f64()
}

fn all_different<'a>(what: &str, values: impl Iterator<Item = &'a str>) {
    let values: Vec<_> = values.collect();
    let different: HashSet<_> = values.iter().collect();
    assert!(values.iter().all(|value| !value.is_empty()), "{what}: {values:?}");
    assert_eq!(different.len(), values.len(), "{what} repeats: {values:?}");
}

#[test]
fn sixty_four_forks_are_different_persons_with_one_past() {
    let daemon = guest::daemon();
    let forks: Vec<ForkInfo> = (0..FORKS / 4).flat_map(|_| guest::forks(&daemon, guest::ONE, 4)).collect();
    // What was drawn by the hook, before the fork was handed out, and what was drawn later.
    let (mut now, mut hooks, mut machine_ids) = (Vec::new(), Vec::new(), Vec::new());
    for fork in &forks {
        let (said_now, said_to_hook, machine_id) = Witness::all(&daemon, &fork.id);
        now.push(said_now);
        hooks.push(said_to_hook);
        machine_ids.push(machine_id);
    }
    let both = || now.iter().chain(&hooks);
    all_different("getrandom", both().map(|witness| witness.getrandom.as_str()));
    all_different("/proc/sys/kernel/random/uuid", both().map(|witness| witness.kernel_uuid.as_str()));
    all_different("uuid4", both().map(|witness| witness.uuid4.as_str()));
    all_different("secrets", both().map(|witness| witness.token.as_str()));
    all_different("host name", now.iter().map(|witness| witness.hostname.as_str()));
    all_different("generation", now.iter().map(|witness| witness.generation.as_str()));
    all_different("machine id", machine_ids.iter().map(String::as_str));
    for (at, fork) in forks.iter().enumerate() {
        assert_eq!(machine_ids[at], fork.machine_id);
        assert_eq!(now[at].hostname, fork.hostname);
        assert_eq!(now[at].generation, fork.generation.to_string());
        assert_eq!(hooks[at].generation, now[at].generation, "hooks see the fork's identity");
        // A fork and not a boot: the same process with the same memory.
        assert_eq!((now[at].pid, &now[at].secret), (now[0].pid, &now[0].secret));
        assert_eq!(now[at].boot_id, now[0].boot_id);
        let monotonic = &now[at].monotonic;
        assert!(monotonic.is_sorted() && monotonic.len() >= 4, "CLOCK_MONOTONIC jumped back: {monotonic:?}");
    }
}

#[test]
fn new_processes_draw_their_own_numbers() {
    let daemon = guest::daemon();
    let line = "python3 -c 'import secrets, uuid; print(secrets.token_hex(16), uuid.uuid4())'";
    let forks = guest::forks(&daemon, guest::ONE, 4);
    let drawn: Vec<_> = forks.iter().map(|fork| daemon.sh(&fork.id, line)).collect();
    all_different("numbers", drawn.iter().flat_map(|line| line.split(' ')));
}

#[test]
fn wall_clocks_are_the_hosts() {
    let daemon = guest::daemon();
    // What a fork waits for its very first pages while the image is being loaded is not counted: 64 KiB at a time take
    // some 20 ms to unpack on an emulated host.
    daemon.fork(guest::ONE);
    daemon.wait_complete(guest::ONE);
    daemon.kill_all();
    for _ in 0..4 {
        let fork = daemon.fork(guest::ONE);
        // Twice: the first command waits for pages, and the shorter it takes the more it says.
        for _ in 0..2 {
            let before = unix_now();
            let wall: f64 = daemon.sh(&fork.id, "date +%s.%N").parse().unwrap();
            let after = unix_now();
            println!("clock: {:+.1} to {:+.1} ms", (wall - after) * 1e3, (wall - before) * 1e3);
            assert!(
                (before - CLOCK..=after + CLOCK).contains(&wall),
                "the guest's clock says {wall}, the host's {before} to {after}"
            );
        }
    }
}

#[test]
fn names_and_environment_are_the_callers() {
    let daemon = guest::daemon();
    let request = serde_json::json!({
        "template": guest::ONE, "names": ["worker-7"], "hostname": "Box-7", "env": {"JOB": "a b\"c"}
    });
    let fork = daemon.forks_with(&request).pop().unwrap();
    let seen = daemon.sh("worker-7", "hostname; cat /etc/hostname; echo \"$JOB $FROM_TEMPLATE\"");
    assert_eq!(seen, "Box-7\nBox-7\na b\"c yes", "{fork:?}");
}
