//! Time goes on where it stopped: timers that were armed before the freeze fire in every fork.

use std::time::Duration;

use forkling_tests::eventually;

use crate::guest::{self, TIMER_SECONDS, Witness};

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
