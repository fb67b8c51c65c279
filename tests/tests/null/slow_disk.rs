//! Disks that answer late or never, and a daemon that stops: forks wait, or end; they never hang and never see wrong memory.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use forkling_daemon::api::types::ForkState;
use forkling_tests::{
    daemon::{Daemon, Settings},
    eventually, proc,
    stuck::Stuck,
};
use rustix::process::Signal;

const PATIENCE: Duration = Duration::from_secs(20);

/// A daemon with two templates that are not loaded.
fn cold() -> Daemon {
    let daemon = Daemon::with_null();
    daemon.build_null("other");
    let (_, settings) = daemon.stop();
    // The other's chunks are its own, for only one disk shall be slow.
    let other = settings.snapshot("other").join("chunks");
    for (path, _) in proc::files(&other) {
        let bytes = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, bytes).unwrap();
    }
    settings.start()
}

fn stuck(settings: &Settings, hold: Duration) -> Stuck {
    Stuck::below(&settings.snapshot("null").join("chunks"), hold)
}

#[test]
fn a_slow_disk_makes_forks_slow_and_nothing_else() {
    let daemon = cold();
    let hold = Duration::from_secs(2);
    let stuck = stuck(&daemon.settings, hold);
    let client = daemon.client.clone();
    let slow = thread::spawn(move || {
        let began = Instant::now();
        (client.forks("null", 4), began.elapsed())
    });
    thread::sleep(Duration::from_millis(200));
    let began = Instant::now();
    let others = daemon.forks("other", 4);
    let took = began.elapsed();
    let (forks, waited) = slow.join().unwrap();
    println!("forks of the slow disk after {waited:?}, of the other after {took:?}");
    assert!(waited > hold / 2 && took < waited, "{waited:?}, {took:?}");
    for fork in forks.iter().chain(&others) {
        assert_eq!(daemon.inspect(&fork.id).unwrap().state, ForkState::Running);
    }
    drop(stuck);
}

/// A fork in the middle of a page fault, whom nobody will ever answer.
#[test]
fn a_daemon_killed_while_forks_wait_for_memory_takes_them_with_it() {
    let daemon = cold();
    let _stuck = stuck(&daemon.settings, PATIENCE);
    let client = daemon.client.clone();
    let waiting = thread::spawn(move || std::panic::catch_unwind(|| client.forks("null", 4)));
    eventually(PATIENCE, "the forks are there", || {
        let count = daemon.processes().len();
        if count == 5 { Ok(()) } else { Err(format!("{count} processes")) }
    });
    thread::sleep(Duration::from_millis(200));
    let (time, _) = daemon.crash();
    println!("forks that waited for memory were gone {time:?} after their daemon");
    assert!(waiting.join().unwrap().is_err(), "the caller lost its connection");
}

#[test]
fn forks_go_on_when_a_stopped_daemon_does() {
    let daemon = cold();
    let stuck = stuck(&daemon.settings, PATIENCE);
    let client = daemon.client.clone();
    let waiting = thread::spawn(move || client.forks("null", 4));
    eventually(PATIENCE, "the forks are there", || {
        let count = daemon.processes().len();
        if count == 5 { Ok(()) } else { Err(format!("{count} processes")) }
    });
    proc::signal(daemon.pid(), Signal::STOP);
    drop(stuck);
    thread::sleep(Duration::from_millis(500));
    assert!(!waiting.is_finished());
    proc::signal(daemon.pid(), Signal::CONT);
    assert_eq!(waiting.join().unwrap().len(), 4);
}

#[test]
fn a_kill_reaches_forks_that_wait_for_memory() {
    let daemon = cold();
    let _stuck = stuck(&daemon.settings, PATIENCE);
    let client = daemon.client.clone();
    let waiting = thread::spawn(move || client.create(&serde_json::json!({"template": "null", "count": 2})));
    eventually(PATIENCE, "the forks are there", || {
        let count = daemon.processes().len();
        if count == 3 { Ok(()) } else { Err(format!("{count} processes")) }
    });
    thread::sleep(Duration::from_millis(200));
    let began = Instant::now();
    daemon.kill_all();
    let results = waiting.join().unwrap().unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "the caller is told at once: {:?}", began.elapsed());
    assert!(results.iter().all(|result| matches!(result, forkling_daemon::api::types::ForkResult::Error(_))));
    daemon.settle(1);
}
