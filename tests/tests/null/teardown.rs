//! Killing many forks is answered at once; soon nothing is left of them.

use std::time::Instant;

use forkling_daemon::api::types::{ForkState, Killed};
use forkling_tests::{daemon::Daemon, eventually, proc};
use serde_json::json;

const COUNT: u32 = 300;

#[test]
fn hundreds_of_forks_are_killed_by_one_request_and_leave_nothing() {
    let daemon = Daemon::with_null();
    daemon.build_null("other");
    let other = daemon.fork("other");
    daemon.forks("null", 4);
    daemon.wait_complete("null");
    daemon.kill_all_of("null");
    daemon.settle(3);
    let before = proc::holdings(daemon.pid());
    let forks = daemon.forks_with(&json!({"template": "null", "count": COUNT, "param": 50}));
    let processes: Vec<_> = forks.iter().filter_map(|fork| proc::Process::find(fork.pid.unwrap())).collect();
    assert_eq!(processes.len() as u32, COUNT);
    let began = Instant::now();
    let killed: Killed = daemon.call("DELETE", "/v1/forks?template=null", None).unwrap();
    let answered = began.elapsed();
    assert_eq!(killed.killed.len() as u32, COUNT);
    assert_eq!(daemon.template("null").unwrap().forks, 0, "who was told that they are dead sees none alive");
    assert!(forks.iter().all(|fork| daemon.inspect(&fork.id).unwrap().state == ForkState::Died));
    // Zombies count as children.
    daemon.settle(3);
    println!("{COUNT} forks: answered after {answered:?}, gone after {:?}", began.elapsed());
    assert!(processes.iter().all(|process| !process.is_alive()));
    eventually(std::time::Duration::from_secs(20), "the daemon holds nothing of them", || {
        let after = proc::holdings(daemon.pid());
        let grown = after.descriptors > before.descriptors || after.memfds > before.memfds;
        if grown { Err(format!("before {before:?}, after {after:?}")) } else { Ok(()) }
    });
    assert_eq!(daemon.list(false).iter().map(|fork| &fork.id).collect::<Vec<_>>(), [&other.id]);
}
