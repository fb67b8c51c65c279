//! A streamed answer has a line for each child as soon as it is ready; who goes away gets no more of them.

use std::collections::HashSet;

use forkling_daemon::api::types::{ForkEvent, ForkInfo, ForkResult};
use forkling_tests::{
    api::Created,
    daemon::{Daemon, Settings},
    proc,
};
use rustix::process::Signal;
use serde_json::json;

/// Children that are parked, and those that must be made.
const PARKED: u32 = 4;
const MADE: u32 = 4;

/// A daemon whose zygote is stopped, and a request of which only the parked half can be served.
fn half_served() -> (Daemon, i32, Created, Vec<ForkInfo>) {
    // An embryo needs no zygote.
    let daemon = Settings::default().arg("--no-embryo").start();
    daemon.build_null("null");
    daemon.fork("null");
    daemon.wait_complete("null");
    daemon.kill_all();
    daemon.park("null", PARKED);
    let zygote = daemon.zygote("null");
    proc::signal(zygote, Signal::STOP);
    let mut answer = daemon.create_streamed(&json!({"template": "null", "count": PARKED + MADE}));
    assert_eq!(answer.status(), 200);
    let handed_out: Vec<_> = (0..PARKED).map(|_| fork(answer.next().expect("a line"))).collect();
    (daemon, zygote, answer, handed_out)
}

fn fork(event: ForkEvent) -> ForkInfo {
    match event.result {
        ForkResult::Fork(fork) => *fork,
        ForkResult::Error(error) => panic!("child {} was not made: {error:?}", event.index),
    }
}

#[test]
fn children_are_told_of_while_others_are_still_made() {
    let (daemon, zygote, mut answer, first) = half_served();
    assert!(first.iter().all(|fork| fork.parked));
    assert_eq!(daemon.list(false).iter().filter(|fork| fork.timings_us.is_some()).count(), first.len());
    proc::signal(zygote, Signal::CONT);
    let rest: Vec<_> = answer.by_ref().map(fork).collect();
    let ids: HashSet<_> = first.iter().chain(&rest).map(|fork| fork.id.as_str()).collect();
    assert_eq!(ids.len() as u32, PARKED + MADE);
    assert_eq!(daemon.list(false).len() as u32, PARKED + MADE);
}

#[test]
fn who_goes_away_keeps_what_was_handed_out_and_gets_nothing_else() {
    let (daemon, zygote, answer, handed_out) = half_served();
    drop(answer);
    daemon.set_pool("null", &json!({}));
    proc::signal(zygote, Signal::CONT);
    daemon.settle(1 + handed_out.len());
    let living: HashSet<_> = daemon.list(false).into_iter().map(|fork| fork.id).collect();
    assert_eq!(living, handed_out.into_iter().map(|fork| fork.id).collect());
}

#[test]
fn every_child_has_one_line() {
    let daemon = Daemon::with_null();
    let names: Vec<_> = (0..60).map(|number| format!("n{}", number % 50)).collect();
    let answer = daemon.create_streamed(&json!({"template": "null", "names": names}));
    let mut seen = vec![0; names.len()];
    let (mut made, mut refused) = (0, 0);
    for event in answer {
        seen[event.index as usize] += 1;
        match event.result {
            ForkResult::Fork(fork) => {
                made += 1;
                assert_eq!(fork.name.as_ref(), Some(&names[event.index as usize]));
            }
            ForkResult::Error(error) => {
                refused += 1;
                assert_eq!(error.code, "fork_exists");
            }
        }
    }
    assert!(seen.iter().all(|&lines| lines == 1), "{seen:?}");
    assert_eq!((made, refused), (50, 10));
}

#[test]
fn errors_of_the_whole_request_are_no_stream() {
    let daemon = Daemon::with_null();
    let post = |headers: &[(&str, &str)], body: &str| {
        daemon.raw("POST", "/v1/forks", headers, Some(body.as_bytes()))
    };
    let ndjson = ("accept", "application/x-ndjson");
    assert_eq!(post(&[ndjson], r#"{"template": "none"}"#).status, 404);
    let both = post(&[ndjson, ("idempotency-key", "k")], r#"{"template": "null"}"#);
    assert_eq!(both.status, 400, "{:?}", String::from_utf8_lossy(&both.body));
    assert!(daemon.list(false).is_empty());
}
