//! Parked forks are made ahead, given out once, replaced, and let go; nobody can tell that one has rehearsed.

use std::{collections::HashSet, fs, time::Duration};

use forkling_daemon::api::types::{ForkInfo, ForkState, PoolInfo};
use forkling_tests::{daemon::Daemon, eventually};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(30);

fn set_pool(daemon: &Daemon, settings: &Value) -> PoolInfo {
    daemon.call("PUT", "/v1/templates/null/pool", Some(settings)).unwrap()
}

fn pool(daemon: &Daemon) -> PoolInfo {
    daemon.call("GET", "/v1/templates/null/pool", None).unwrap()
}

/// A daemon whose null template has `count` parked forks.
fn with_parked(count: u32, rehearsal: &str, keep_writes: bool) -> Daemon {
    let daemon = Daemon::with_null();
    let settings = json!({"low": count, "high": count, "rehearsal": rehearsal, "keep_writes": keep_writes});
    set_pool(&daemon, &settings);
    until_parked(&daemon, count);
    daemon
}

/// Waits until the pool holds `count` and nothing else is under way, the forks that learn the working set included.
fn until_parked(daemon: &Daemon, count: u32) {
    eventually(PATIENCE, "the pool is full", || {
        let (pool, pids) = (pool(daemon), parked_pids(daemon));
        let full = pool.parked == count && pool.building == 0 && pids.len() == count as usize;
        if full { Ok(()) } else { Err(format!("{pool:?}, processes {pids:?}")) }
    });
}

/// Processes of the parked forks: all children but the zygote and the forks given out.
fn parked_pids(daemon: &Daemon) -> HashSet<i32> {
    let mut children: HashSet<i32> = daemon.children().into_iter().collect();
    children.remove(&daemon.zygote("null"));
    for fork in daemon.list(false) {
        children.remove(&fork.pid.unwrap());
    }
    children
}

#[test]
fn a_pool_is_there_again_after_a_restart() {
    let daemon = with_parked(2, "acknowledge", true);
    let (_, settings) = daemon.stop();
    let daemon = settings.start();
    eventually(PATIENCE, "the pool is there again", || {
        let now = pool(&daemon);
        if now.parked == 2 { Ok(()) } else { Err(format!("{now:?}")) }
    });
    assert!(daemon.fork("null").parked);
    set_pool(&daemon, &json!({"low": 0, "high": 0}));
    let (_, settings) = daemon.stop();
    // What cannot be read is no pool, and no reason not to start.
    std::fs::write(settings.state().join("templates/null/pool.json"), "{").unwrap();
    let daemon = settings.start();
    assert_eq!(pool(&daemon).high, 0);
    assert!(!daemon.fork("null").parked);
}

#[test]
fn a_pool_fills_serves_refills_and_empties() {
    let daemon = with_parked(3, "acknowledge", true);
    let ahead = parked_pids(&daemon);
    assert_eq!(ahead.len(), 3);
    let forks: Vec<ForkInfo> = (0..3).map(|_| daemon.fork("null")).collect();
    let first: HashSet<i32> = forks.iter().filter_map(|fork| fork.pid).collect();
    assert!(forks[0].parked && ahead.contains(&forks[0].pid.unwrap()), "the process was there before");
    assert_eq!(first.len(), 3);
    let generations: HashSet<u64> = forks.iter().map(|fork| fork.generation).collect();
    let ids: HashSet<&str> = forks.iter().map(|fork| fork.machine_id.as_str()).collect();
    assert_eq!((generations.len(), ids.len()), (3, 3));
    until_parked(&daemon, 3);
    let bypass = daemon.forks_with(&json!({"template": "null", "pool": "bypass"}));
    assert!(!bypass[0].parked);
    let info = pool(&daemon);
    assert!(info.hits >= 1 && info.hits + info.misses == 3, "{info:?}");
    daemon.kill_all();
    set_pool(&daemon, &json!({"low": 0, "high": 0}));
    until_parked(&daemon, 0);
    daemon.settle(1);
}

#[test]
fn a_pool_grows_when_it_is_found_empty() {
    let daemon = Daemon::with_null();
    daemon.load("null");
    set_pool(&daemon, &json!({"low": 0, "high": 4, "rehearsal": "off"}));
    assert!(!daemon.fork("null").parked);
    eventually(PATIENCE, "one is parked", || match pool(&daemon) {
        pool if pool.parked > 0 => Ok(()),
        pool => Err(format!("{pool:?}")),
    });
    assert!(daemon.fork("null").parked);
    assert!(pool(&daemon).target <= 4);
}

#[test]
fn a_parked_fork_that_dies_is_replaced_and_nobody_is_told() {
    let daemon = with_parked(2, "acknowledge", true);
    for pid in parked_pids(&daemon) {
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    }
    let fork = daemon.fork("null");
    assert_eq!(fork.state, ForkState::Running);
    until_parked(&daemon, 2);
}

/// Guest memory of a process: the writable private mapping of the image.
fn guest_memory(pid: i32) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let line = maps.lines().find(|line| line.contains("rw-p") && line.contains("memfd:")).expect("an image");
    let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
    let (start, end) = (u64::from_str_radix(start, 16).unwrap(), u64::from_str_radix(end, 16).unwrap());
    let mut bytes = vec![0; (end - start) as usize];
    fs::File::open(format!("/proc/{pid}/mem")).unwrap().read_exact_at(&mut bytes, start).unwrap();
    bytes
}

#[test]
fn a_rehearsed_fork_has_the_memory_of_one_that_never_ran() {
    let fresh = with_parked(1, "off", true);
    let untouched = guest_memory(*parked_pids(&fresh).iter().next().unwrap());
    for keep_writes in [true, false] {
        set_pool(
            &fresh,
            &json!({"low": 1, "high": 1, "rehearsal": "acknowledge", "keep_writes": keep_writes}),
        );
        until_parked(&fresh, 1);
        let rehearsed = guest_memory(*parked_pids(&fresh).iter().next().unwrap());
        assert!(rehearsed == untouched, "rehearsals leave nothing behind");
    }
    let fork = fresh.forks_with(&json!({"template": "null", "param": 50})).remove(0);
    assert!(fork.parked);
    assert!(guest_memory(fork.pid.unwrap()) != untouched, "and a fork that runs does");
}

#[test]
fn a_fork_is_reset_in_place_again_and_again() {
    let daemon = Daemon::with_null();
    daemon.fork("null");
    // A fork made before that could not be looked into: its missing pages are the pager's.
    daemon.wait_complete("null");
    let fork = daemon.fork("null");
    let pid = fork.pid.unwrap();
    let before = guest_memory(pid);
    let mut generations = HashSet::from([fork.generation]);
    for (identity, keep) in [("same", true), ("new", false), ("same", false), ("new", true)] {
        let path = format!("/v1/forks/{}/reset", fork.id);
        let last = daemon.inspect(&fork.id).unwrap();
        let body = json!({"identity": identity, "keep_writes": keep});
        let reset: ForkInfo = daemon.call("POST", &path, Some(&body)).unwrap();
        assert_eq!(
            (reset.id.as_str(), reset.pid, reset.state),
            (fork.id.as_str(), Some(pid), ForkState::Running)
        );
        assert!(generations.insert(reset.generation), "each activation has a generation of its own");
        assert_eq!(reset.machine_id == last.machine_id, identity == "same");
        assert_eq!(guest_memory(pid).len(), before.len());
    }
    let unknown = daemon.call::<ForkInfo>("POST", "/v1/forks/f-nosuch/reset", Some(&json!({})));
    assert_eq!(unknown.unwrap_err().code, "fork_not_found");
    daemon.kill(&fork.id).unwrap();
    let dead = daemon.call::<ForkInfo>("POST", &format!("/v1/forks/{}/reset", fork.id), Some(&json!({})));
    assert_eq!(dead.unwrap_err().code, "fork_died");
}

#[test]
fn impossible_pools_are_refused() {
    let daemon = Daemon::with_null();
    for body in [json!({"low": 2, "high": 1}), json!({"high": 100_000}), json!({"rehearsal": "loud"})] {
        let error = daemon.call::<PoolInfo>("PUT", "/v1/templates/null/pool", Some(&body)).unwrap_err();
        assert_eq!(error.code, "invalid_request", "{error:?}");
    }
    let error = daemon.call::<PoolInfo>("PUT", "/v1/templates/no/pool", Some(&json!({}))).unwrap_err();
    assert_eq!(error.code, "template_not_found");
}
