//! The process of the next fork is there before it is asked for; nobody depends on it.

use std::time::Duration;

use forkling_tests::{daemon::Daemon, eventually, proc};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until there are `count` embryos.
fn wait_for(daemon: &Daemon, count: usize) -> Vec<i32> {
    eventually(PATIENCE, "there are as many embryos as templates in use", || {
        let found = daemon.embryos();
        if found.len() == count { Ok(()) } else { Err(format!("{found:?}")) }
    });
    daemon.embryos()
}

/// A daemon with a null template in use, and its embryo.
fn with_embryo() -> (Daemon, i32) {
    let daemon = Daemon::with_null();
    let first = daemon.fork("null");
    daemon.kill(&first.id).unwrap();
    let embryo = wait_for(&daemon, 1)[0];
    (daemon, embryo)
}

#[test]
fn a_fork_is_made_of_it_and_another_takes_its_place() {
    let (daemon, first) = with_embryo();
    let fork = daemon.fork("null");
    assert_eq!(fork.pid, Some(first));
    assert!(!fork.parked, "its VM was made for the request");
    assert_eq!(fork.timings_us.map(|timings| timings.fork), Some(0.0), "its process was there");
    let second = wait_for(&daemon, 1)[0];
    assert_ne!(second, first);
    // All others of a burst come from the zygote.
    let pids: Vec<_> = daemon.forks("null", 8).iter().map(|fork| fork.pid.unwrap()).collect();
    assert_eq!(pids.iter().filter(|&&pid| pid == second).count(), 1, "{pids:?}");
    daemon.kill_all();
    wait_for(&daemon, 1);
    daemon.settle(1);
}

#[test]
fn killed_it_is_missed_by_nobody() {
    let (daemon, embryo) = with_embryo();
    proc::kill(embryo);
    daemon.fork("null");
    let next = wait_for(&daemon, 1)[0];
    proc::kill(next);
    // Nothing is asked for meanwhile.
    eventually(PATIENCE, "a dead embryo is replaced and buried", || match daemon.embryos()[..] {
        [pid] if pid != next && !proc::children(daemon.pid()).contains(&next) => Ok(()),
        ref found => Err(format!("{found:?}")),
    });
}

#[test]
fn refused_requests_do_not_use_it_up() {
    let (daemon, embryo) = with_embryo();
    let huge = "x".repeat(100_000);
    for _ in 0..3 {
        let refused = daemon.create(&json!({"template": "null", "env": {"HUGE": huge}}));
        assert_eq!(refused.unwrap_err().code, "environment_too_large");
    }
    assert_eq!(daemon.fork("null").pid, Some(embryo));
}

#[test]
fn it_goes_with_its_zygote() {
    let (daemon, _) = with_embryo();
    eventually(PATIENCE, "the template is not in use", || {
        daemon.unload("null").map(drop).map_err(|error| error.code)
    });
    wait_for(&daemon, 0);
    daemon.fork("null");
    wait_for(&daemon, 1);
    proc::kill(daemon.zygote("null"));
    wait_for(&daemon, 0);
    daemon.settle(1);
}

#[test]
fn a_pool_leaves_it_alone_and_it_can_be_switched_off() {
    let (daemon, embryo) = with_embryo();
    daemon.park("null", 3);
    assert_eq!(daemon.embryos(), [embryo]);
    daemon.set_pool("null", &json!({"low": 0, "high": 0}));
    let daemon = daemon.stop().1.arg("--no-embryo").start();
    daemon.fork("null");
    daemon.wait_complete("null");
    let before = daemon.fork("null");
    // As long as it would take.
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(daemon.embryos(), Vec::<i32>::new());
    assert_ne!(daemon.fork("null").pid, before.pid);
}
