//! At its limits the daemon refuses, says so, and goes on.

use std::time::Duration;

use forkling_daemon::api::types::ForkResult;
use forkling_tests::{
    daemon::{Daemon, Settings},
    eventually,
};
use rustix::process::{Pid, Resource, Rlimit};
use serde_json::json;

#[test]
fn more_forks_than_the_descriptor_limit_allows_are_refused() {
    let mut settings = Settings::default();
    settings.descriptors = Some(256 + 5 * 6);
    let daemon = settings.start();
    daemon.build_null("null");
    let most = daemon.health().max_forks;
    assert!((1..=8).contains(&most), "{most}");
    let results = daemon.create(&json!({"template": "null", "count": most + 3})).unwrap();
    let made = results.iter().filter(|result| matches!(result, ForkResult::Fork(_))).count() as u64;
    assert_eq!(made, most);
    for result in &results {
        if let ForkResult::Error(error) = result {
            assert_eq!((error.code.as_str(), error.retryable), ("too_many_forks", true));
        }
    }
    daemon.kill_all();
    daemon.settle(1);
    assert_eq!(daemon.forks("null", 1).len(), 1);
}

#[test]
fn a_pool_takes_no_more_descriptors_than_there_are() {
    let mut settings = Settings::default();
    settings.descriptors = Some(256 + 8 * 6);
    let daemon = settings.start();
    daemon.build_null("null");
    let most = daemon.health().max_forks;
    daemon.set_pool("null", &json!({"low": 3 * most, "high": 3 * most}));
    eventually(Duration::from_secs(30), "the pool is as full as can be", || {
        let pool = daemon.pool("null");
        if u64::from(pool.parked) == most && pool.building == 0 { Ok(()) } else { Err(format!("{pool:?}")) }
    });
    // What is taken out of it is a fork in the parked one's place, but for an instant in which it is neither.
    daemon.forks("null", 2);
    for _ in 0..20 {
        let pool = daemon.pool("null");
        assert!(u64::from(pool.parked + pool.building) <= most, "{pool:?}");
        std::thread::sleep(Duration::from_millis(25));
    }
    daemon.forks("null", u32::try_from(most).unwrap() - 2);
    assert_eq!(daemon.create(&json!({"template": "null"})).unwrap_err().code, "too_many_forks");
}

#[test]
fn a_zygote_that_may_not_fork_says_so() {
    let daemon = Daemon::with_null();
    let zygote = Pid::from_raw(daemon.zygote("null")).unwrap();
    // The lowest free number goes to the control socket of a fork, and none is left for its VM.
    let open =
        |number: &u64| std::fs::exists(format!("/proc/{}/fd/{number}", zygote.as_raw_nonzero())).unwrap();
    let enough = (0..).find(|number| !open(number)).unwrap() + 1;
    let few = Rlimit { current: Some(enough), maximum: Some(enough) };
    rustix::process::prlimit(Some(zygote), Resource::Nofile, few).unwrap();
    let results = daemon.create(&json!({"template": "null", "count": 3})).unwrap();
    for result in &results {
        let ForkResult::Error(error) = result else { panic!("{result:?}") };
        assert_eq!(error.code, "fork_failed", "{error:?}");
        assert!(error.cause.is_some() && !error.remediation.is_empty(), "{error:?}");
    }
    assert!(daemon.list(false).is_empty());
}

#[test]
fn a_fork_that_takes_too_long_is_given_up() {
    let daemon = Daemon::with_null();
    // More pages than can be written in a millisecond.
    let results =
        daemon.create(&json!({"template": "null", "count": 4, "param": 14_000, "timeout_ms": 1})).unwrap();
    for result in &results {
        let ForkResult::Error(error) = result else { panic!("{result:?}") };
        assert_eq!((error.code.as_str(), error.retryable), ("fork_timeout", true));
    }
    daemon.settle(1);
    assert!(daemon.list(false).is_empty());
    assert_eq!(daemon.forks("null", 4).len(), 4);
}
