//! What the host has no room for is refused at once, with when to come back; what fits is made.

use forkling_daemon::api::types::{ErrorBody, ForkResult, Kind};
use forkling_tests::{
    daemon::{Daemon, Settings},
    eventually, proc, spec,
};
use serde_json::{Value, json};

/// Memory of the host in MiB.
fn host_mib() -> u64 {
    proc::kib_field("/proc/meminfo", "MemTotal").expect("/proc/meminfo has it") >> 20
}

/// A daemon that must leave more memory free than there is.
fn without_room() -> Daemon {
    let daemon = Settings::default().arg("--memory-reserve").arg((2 * host_mib()).to_string()).start();
    daemon.build_null("null");
    daemon
}

fn is_refusal(error: &ErrorBody) {
    assert_eq!(
        (error.code.as_str(), error.retryable, error.kind),
        ("host_full", true, Kind::Infra),
        "{error:?}"
    );
    assert!(error.retry_after_s.is_some_and(|seconds| (1..=60).contains(&seconds)), "{error:?}");
}

/// How many were made; the others must be refusals, and come after them.
fn made(results: &[ForkResult]) -> usize {
    let made = results.iter().take_while(|result| matches!(result, ForkResult::Fork(_))).count();
    for result in &results[made..] {
        let ForkResult::Error(error) = result else { panic!("made after one was refused: {result:?}") };
        is_refusal(error);
    }
    made
}

#[test]
fn without_memory_the_whole_answer_is_a_refusal() {
    let daemon = without_room();
    for (count, headers) in [(1, &[][..]), (5, &[]), (5, &[("accept", "application/x-ndjson")])] {
        let body = serde_json::to_vec(&json!({"template": "null", "count": count})).unwrap();
        let reply = daemon.raw("POST", "/v1/forks", headers, Some(&body));
        assert_eq!(reply.status, 429);
        let answer: Value = serde_json::from_slice(&reply.body).unwrap();
        let error: ErrorBody = serde_json::from_value(answer["error"].clone()).unwrap();
        is_refusal(&error);
        assert!(error.message.contains("memory") && error.message.contains("--memory-reserve"), "{error:?}");
        assert_eq!(reply.header("retry-after"), error.retry_after_s.map(|s| s.to_string()).as_deref());
    }
    assert!(daemon.list(true).is_empty());
    daemon.settle(1);
}

#[test]
fn a_batch_is_made_as_far_as_the_memory_goes() {
    let share = host_mib() / 8;
    let daemon = Settings::default().arg("--fork-growth").arg(share.to_string()).start();
    let mut spec = spec::null("large", &daemon.settings.null_guest());
    spec["memory_mib"] = json!(share + 64);
    daemon.build(&spec).outcome.unwrap();
    let results = daemon.create(&json!({"template": "large", "count": 20})).unwrap();
    let made = made(&results);
    assert!((1..=8).contains(&made), "{made} forks of which each may take an eighth of the memory");
    // What those were promised is theirs still when they run.
    let more = daemon.create(&json!({"template": "large", "count": 20}));
    let more = more.map_or_else(
        |error| {
            is_refusal(&error);
            0
        },
        |results| self::made(&results),
    );
    assert!(made + more <= 8, "{made} and {more}");
    daemon.kill_all();
    daemon.settle(1);
    eventually(std::time::Duration::from_secs(20), "what the dead were promised is free", || {
        daemon.create(&json!({"template": "large"})).map(drop).map_err(|error| error.message)
    });
}

#[test]
fn constructions_that_wait_have_a_bound() {
    const QUEUE: usize = 4;
    let daemon = Settings::default().arg("--queue").arg(QUEUE.to_string()).start();
    daemon.build_null("null");
    let at_once = 2 * std::thread::available_parallelism().unwrap().get();
    for _ in 0..3 {
        let results = daemon.create(&json!({"template": "null", "count": at_once + QUEUE + 10})).unwrap();
        assert_eq!(made(&results), at_once + QUEUE);
        let ForkResult::Error(error) = results.last().unwrap() else { panic!("it does not fit") };
        assert!(error.message.contains("--queue"), "{error:?}");
    }
    daemon.kill_all();
    daemon.settle(1);
}

#[test]
fn parked_forks_wait_in_no_queue() {
    let daemon = Settings::default().arg("--queue").arg("0").start();
    daemon.build_null("null");
    daemon.fork("null");
    daemon.wait_complete("null");
    let at_once = 2 * std::thread::available_parallelism().unwrap().get() as u32;
    daemon.park("null", at_once + 5);
    assert_eq!(daemon.forks("null", at_once + 5).len() as u32, at_once + 5);
}

#[test]
fn parked_forks_are_given_up_before_a_request_is_refused() {
    let daemon = without_room();
    daemon.build_null("other");
    daemon.load("null");
    daemon.park("null", 3);
    let zygote = daemon.zygote("null");
    let parked: Vec<_> = daemon.processes().into_iter().filter(|process| process.pid != zygote).collect();
    assert!(parked.len() >= 3, "{parked:?}");
    is_refusal(&daemon.create(&json!({"template": "other"})).unwrap_err());
    eventually(std::time::Duration::from_secs(20), "their memory was needed", || {
        let left: Vec<_> = parked.iter().filter(|process| process.is_alive()).collect();
        // The zygote of the other template may be among them.
        if left.len() + 3 <= parked.len() { Ok(()) } else { Err(format!("{left:?}")) }
    });
}
