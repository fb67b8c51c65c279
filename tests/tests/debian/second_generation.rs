//! A template made of a fork: what the fork did is the past of all its forks.

use serde_json::json;

use crate::guest::{self, Witness};

#[test]
fn a_fork_becomes_a_template() {
    let daemon = guest::daemon();
    let parent = daemon.fork(guest::ONE);
    let first = Witness::ask(&daemon, &parent.id);
    daemon.sh(&parent.id, "echo prepared >/root/state && echo ram >/dev/shm/state");
    let template = daemon.snapshot(&parent.id, "second").expect("a running fork can be saved");
    assert_eq!(template.parent.unwrap().fork, parent.id);
    assert_eq!(
        daemon.sh(&parent.id, "cat /root/state; echo mine >/root/state; hostname"),
        format!("prepared\n{}", parent.hostname)
    );
    let after = Witness::ask(&daemon, &parent.id);
    assert!(
        after.generation.parse::<u64>().unwrap() > parent.generation,
        "the parent goes on as a new generation"
    );

    let forks = guest::forks(&daemon, "second", 3);
    let mut tokens = vec![first.token, after.token];
    for fork in &forks {
        let witness = Witness::ask(&daemon, &fork.id);
        assert_eq!((witness.pid, &witness.secret), (first.pid, &first.secret), "still the same process");
        assert_eq!(witness.generation, fork.generation.to_string());
        assert_eq!(witness.hostname, fork.hostname);
        assert!(witness.monotonic.is_sorted(), "{:?}", witness.monotonic);
        assert_eq!(daemon.sh(&fork.id, "cat /root/state /dev/shm/state"), "prepared\nram");
        tokens.push(witness.token);
    }
    tokens.sort();
    tokens.dedup();
    assert_eq!(tokens.len(), 5, "each has random numbers of its own");
    assert_eq!(daemon.remove_template("second").unwrap_err().code, "template_in_use");
    daemon.kill_all();
    daemon.remove_template("second").unwrap();
    let gone = daemon.create(&json!({"template": "second"})).unwrap_err();
    assert_eq!(gone.code, "template_not_found");
}
