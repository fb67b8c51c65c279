//! Time goes on where it stopped: timers that were armed before the freeze fire in every fork.

use std::{thread, time::Duration};

use forkling_daemon::api::types::ForkInfo;
use forkling_tests::eventually;
use serde_json::json;

use crate::guest::{self, TIMER_SECONDS, Witness};

/// How old a fork is when it is reset: its timers must not be late by that. Half of it is more than an emulated host needs.
const AGE: Duration = Duration::from_secs(4);

#[test]
fn a_timer_armed_before_the_freeze_fires_in_each_fork() {
    let daemon = guest::daemon();
    let forks = guest::forks(&daemon, guest::ONE, 3);
    for fork in &forks {
        let mut last = None;
        eventually(Duration::from_secs(60), "the timer fires", || {
            let witness = Witness::ask(&daemon, &fork.id);
            let fired = witness.timer.at.is_some();
            last = Some(witness);
            if fired { Ok(()) } else { Err("it has not".to_owned()) }
        });
        let witness = last.expect("it was asked");
        let after = witness.timer.at.unwrap() - witness.armed;
        assert_eq!(witness.timer.generation.as_ref(), Some(&witness.generation), "it fired in the fork");
        assert!((TIMER_SECONDS..TIMER_SECONDS + 10.0).contains(&after), "it fired after {after} s");
    }
    let later = daemon.fork(guest::ONE);
    let hook = Witness::heard_by_hook(&daemon, &later.id);
    assert!(hook.timer.at.is_none(), "the template's own time stands still: {hook:?}");
}

#[test]
fn the_first_timer_of_a_fork_that_was_reset_is_on_time() {
    let daemon = guest::daemon();
    let fork = daemon.fork(guest::ONE);
    let first = Witness::heard_by_hook(&daemon, &fork.id);
    thread::sleep(AGE);
    let path = format!("/v1/forks/{}/reset", fork.id);
    let _: ForkInfo = daemon.call("POST", &path, Some(&json!({"timeout_ms": 300_000}))).unwrap();
    let again = Witness::heard_by_hook(&daemon, &fork.id);
    assert!(again.generation != first.generation, "the hook ran after the reset");
    let allowed = AGE.as_secs_f64() / 2.0;
    assert!(again.waited < allowed, "20 ms took {} s, and {} s before the reset", again.waited, first.waited);
    let asked_at = |witness: &Witness| *witness.monotonic.last().expect("it was asked");
    let passed = asked_at(&again) - asked_at(&first);
    assert!(passed.abs() < allowed, "guest time went on by {passed} s with the reset");
}
