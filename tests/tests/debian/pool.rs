//! Nobody can tell a rehearsed fork from one made for the request, however long it waited; and a fork that was reset is
//! as good as new.

use std::{
    collections::HashSet,
    time::{Duration, SystemTime},
};

use forkling_daemon::api::types::{ForkInfo, ForkMemory, PoolInfo};
use forkling_tests::{daemon::Daemon, eventually};
use serde_json::json;

use crate::guest::{self, ONE, TWO, Witness};

/// How long forks are left parked.
const WAIT: Duration = Duration::from_secs(10);

/// Bytes of the pages that a rehearsal writes, at least; a fork that is trimmed without having run has none of them.
const KEPT: u64 = 1 << 20;

/// How far a fork's wall clock may be off the host's, in seconds.
const CLOCK: f64 = 0.050;

/// What two forks of one template have in common at their first command: process ids and counters, mounts, files.
const TRACES: &str = "echo $$; grep ^processes /proc/stat; ls -A /tmp /run /var/tmp /root; ls /proc | grep -c '^[0-9]'; \
    cat /proc/mounts /proc/modules; cat /proc/sys/kernel/random/boot_id";

fn park(daemon: &Daemon, template: &str, count: u32) {
    daemon.fork(template);
    daemon.wait_complete(template);
    daemon.kill_all();
    let path = format!("/v1/templates/{template}/pool");
    let _: PoolInfo = daemon.call("PUT", &path, Some(&json!({"low": count, "high": count}))).unwrap();
    eventually(Duration::from_secs(120), "the pool is full", || {
        let pool: PoolInfo = daemon.call("GET", &path, None).unwrap();
        if pool.parked == count && pool.building == 0 { Ok(()) } else { Err(format!("{pool:?}")) }
    });
}

fn fork(daemon: &Daemon, template: &str, pool: &str) -> ForkInfo {
    let fork = daemon.forks_with(&json!({"template": template, "pool": pool})).pop().unwrap();
    assert_eq!(fork.parked, pool == "use");
    fork
}

fn wall_clock_is_right(daemon: &Daemon, id: &str) {
    let unix_now =
        || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_secs_f64();
    let before = unix_now();
    let wall: f64 = daemon.sh(id, "date +%s.%N").parse().unwrap();
    let after = unix_now();
    assert!((before - CLOCK..=after + CLOCK).contains(&wall), "{wall} is not in {before} to {after}");
}

#[test]
fn rehearsed_forks_that_waited_are_like_fresh_ones() {
    let daemon = guest::daemon();
    park(&daemon, ONE, 3);
    std::thread::sleep(WAIT);
    let uptime =
        |fork: &ForkInfo| -> f64 { daemon.sh(&fork.id, "cut -d' ' -f1 /proc/uptime").parse().unwrap() };
    let parked = fork(&daemon, ONE, "use");
    let memory: ForkMemory = daemon.call("GET", &format!("/v1/forks/{}/memory", parked.id), None).unwrap();
    assert!(memory.private_bytes > KEPT, "it was not trimmed while it waited: {memory:?}");
    let fresh = fork(&daemon, ONE, "bypass");
    assert_eq!(daemon.sh(&parked.id, TRACES), daemon.sh(&fresh.id, TRACES));
    wall_clock_is_right(&daemon, &parked.id);
    let others = [fork(&daemon, ONE, "use"), fork(&daemon, ONE, "use"), fork(&daemon, ONE, "bypass")];
    let ups: Vec<f64> = others.iter().map(uptime).collect();
    assert!(ups.iter().all(|up| (up - ups[2]).abs() < WAIT.as_secs_f64() / 4.0), "guest time ran: {ups:?}");
    let seen: Vec<(Witness, Witness, String)> =
        others.iter().map(|fork| Witness::all(&daemon, &fork.id)).collect();
    for ((now, hook, machine_id), fork) in seen.iter().zip(&others) {
        assert_eq!(*machine_id, fork.machine_id);
        assert_eq!(now.generation, fork.generation.to_string());
        assert_eq!(hook.generation, now.generation, "the hook ran for this fork, not for its rehearsal");
        assert_eq!((now.pid, &now.secret), (seen[0].0.pid, &seen[0].0.secret));
    }
    let drawn = seen.iter().flat_map(|(now, hook, _)| {
        [now, hook].map(|w| [&w.getrandom, &w.kernel_uuid, &w.uuid4, &w.token]).concat()
    });
    let drawn: Vec<&String> = drawn.collect();
    assert_eq!(drawn.iter().collect::<HashSet<_>>().len(), drawn.len(), "a random number came twice");
}

fn reset_and_look(template: &str) {
    let daemon = guest::daemon_with(template);
    park(&daemon, template, 1);
    let fork = fork(&daemon, template, "use");
    let first = Witness::ask(&daemon, &fork.id);
    let mut seen = HashSet::from([first.getrandom.clone(), first.token.clone()]);
    for keep_writes in [true, false] {
        daemon.sh(&fork.id, "echo x > /root/mark; sleep 1000 >/dev/null 2>&1 & ls /root/mark");
        let path = format!("/v1/forks/{}/reset", fork.id);
        let reset: ForkInfo = daemon
            .call("POST", &path, Some(&json!({"keep_writes": keep_writes, "timeout_ms": 300_000})))
            .unwrap();
        assert_eq!((&reset.id, reset.pid, &reset.hostname), (&fork.id, fork.pid, &fork.hostname));
        assert!(reset.generation > fork.generation);
        assert_eq!(daemon.sh(&fork.id, "ls /root/mark 2>/dev/null; pgrep -x sleep; echo clean"), "clean");
        let witness = Witness::ask(&daemon, &fork.id);
        assert_eq!(witness.generation, reset.generation.to_string());
        assert_eq!(
            (witness.pid, &witness.secret),
            (first.pid, &first.secret),
            "the template's own process is back"
        );
        assert!(seen.insert(witness.getrandom) && seen.insert(witness.token), "randomness is fresh");
        wall_clock_is_right(&daemon, &fork.id);
    }
}

#[test]
fn a_fork_is_reset_in_place() {
    reset_and_look(ONE);
}

#[test]
fn a_fork_with_two_vcpus_is_reset_in_place() {
    reset_and_look(TWO);
}
