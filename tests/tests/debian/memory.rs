//! What an idle fork costs the host.

use std::time::Duration;

use forkling_daemon::api::types::ForkMemory;
use forkling_tests::{daemon::Daemon, eventually, proc};
use serde_json::{Value, json};

use crate::guest;

const FORKS: u32 = 32;

/// Most memory of one idle fork that has answered a command, in bytes.
const LIMIT: u64 = 8 << 20;

fn available() -> u64 {
    proc::kib_field("/proc/meminfo", "MemAvailable").expect("Linux says what is available")
}

#[test]
fn an_idle_fork_costs_at_most_eight_mib() {
    let daemon = guest::daemon();
    let warm = daemon.fork(guest::ONE);
    daemon.sh(&warm.id, "true");
    daemon.wait_complete(guest::ONE);
    let before = available();
    for _ in 0..FORKS / 8 {
        for fork in guest::forks(&daemon, guest::ONE, 8) {
            daemon.sh(&fork.id, "true");
        }
    }
    let each = before.saturating_sub(available()) / u64::from(FORKS);
    println!("memory: {:.2} MiB for an idle fork", each as f64 / f64::from(1 << 20));
    assert!(each <= LIMIT, "{each} bytes for an idle fork");
}

/// Writes files of few bytes and of many, some of them in the overlay.
const FILL: &str = r#"
mkdir /dev/shm/few /root/few
for i in $(seq 200); do echo "file $i of $RANDOM" > /dev/shm/few/$i; done
for i in $(seq 50); do echo "file $i of $RANDOM" > /root/few/$i; done
head -c 50000 /dev/urandom > /dev/shm/many
"#;

/// A sum of all that [`FILL`] has written.
const SUM: &str = "cat /dev/shm/few/* /root/few/* /dev/shm/many | sha256sum | cut -c1-64";

/// Starts a process that says every second that its memory is what it was, and runs no program for that.
const TICK: &str = r#"
cat > /dev/shm/tick <<'END'
mkfifo /dev/shm/never; exec 3<>/dev/shm/never
for i in {1..20}; do line[i]="$i squared is $((i * i))"; done
while true; do
    for i in {1..20}; do [ "${line[i]}" = "$i squared is $((i * i))" ] || { echo wrong > /dev/shm/ticks; exit; }; done
    echo tick >> /dev/shm/ticks; read -t 1 -u 3
done
END
setsid bash /dev/shm/tick </dev/null >/dev/null 2>&1 &
"#;

fn private(daemon: &Daemon, fork: &str) -> u64 {
    let memory: ForkMemory = daemon.call("GET", &format!("/v1/forks/{fork}/memory"), None).unwrap();
    memory.private_bytes
}

/// Leaves a fork alone until it has given back so many hundredths of the memory that it has written.
fn goes_to_rest(daemon: &Daemon, fork: &str, hundredths: u64) {
    const PATIENCE: Duration = Duration::from_secs(60);
    let before = private(daemon, fork);
    eventually(PATIENCE, "the fork gives memory back", || {
        let now = private(daemon, fork);
        if now * 100 < before * (100 - hundredths) {
            Ok(())
        } else {
            Err(format!("{before} bytes, now {now}"))
        }
    });
}

#[test]
fn a_fork_at_rest_gives_back_what_is_nearly_equal_to_its_template() {
    let daemon = guest::settings().arg("--trim-after").arg("3").start();
    guest::ensure(&daemon, guest::ONE);
    let first = daemon.fork(guest::ONE);
    daemon.wait_complete(guest::ONE);
    daemon.kill(&first.id).unwrap();
    let fork = daemon.fork(guest::ONE).id;
    let run = |line: &str| daemon.exec(&fork, &json!({"argv": ["bash", "-c", line]})).unwrap();
    assert_eq!(run(FILL).end.exit_code, Some(0));
    let sum = daemon.sh(&fork, SUM);
    // It does so each time that it comes to rest.
    for round in 0..2 {
        goes_to_rest(&daemon, &fork, 50);
        assert_eq!(daemon.sh(&fork, SUM), sum, "round {round}");
    }

    // What runs meanwhile goes on. Its own pages differ in much.
    assert_eq!(run(TICK).end.exit_code, Some(0));
    let ticks = |fork: &str| -> u32 {
        let said = daemon.sh(fork, "sleep 1; sort /dev/shm/ticks | uniq -c");
        let (count, what) = said.trim().split_once(' ').expect("a number and a word");
        assert_eq!(what, "tick", "the process's memory is what it was");
        count.parse().expect("a number")
    };
    for round in 0..3 {
        let before = ticks(&fork);
        goes_to_rest(&daemon, &fork, 30);
        std::thread::sleep(Duration::from_secs(3));
        let ticks = ticks(&fork) - before;
        assert!(ticks >= 3, "{ticks} in round {round}");
        assert_eq!(daemon.sh(&fork, SUM), sum, "round {round}");
    }

    // What it saves is what it holds.
    goes_to_rest(&daemon, &fork, 30);
    daemon.snapshot(&fork, "rested").expect("a fork at rest can be saved");
    assert_eq!(daemon.sh(&fork, SUM), sum);
    let copy = daemon.fork("rested").id;
    assert_eq!(daemon.sh(&copy, SUM), sum);
    let before = ticks(&copy);
    assert!(ticks(&copy) > before, "its process goes on in a fork of it");
    daemon.kill(&copy).unwrap();
    daemon.remove_template("rested").unwrap();

    // A reset leaves nothing of it. It has been at rest for long by now.
    assert_eq!(daemon.sh(&fork, SUM), sum);
    goes_to_rest(&daemon, &fork, 30);
    daemon.call::<Value>("POST", &format!("/v1/forks/{fork}/reset"), Some(&json!({}))).unwrap();
    assert_eq!(daemon.sh(&fork, "ls /dev/shm /root | grep -c -e few -e many -e tick || true"), "0");
    assert_eq!(run(FILL).end.exit_code, Some(0));
    let sum = daemon.sh(&fork, SUM);
    goes_to_rest(&daemon, &fork, 50);
    assert_eq!(daemon.sh(&fork, SUM), sum);
}

#[test]
fn a_fork_that_rests_for_long_gives_back_what_its_timers_have_touched() {
    let daemon = guest::settings().arg("--trim-after").arg("1").start();
    guest::ensure(&daemon, guest::ONE);
    let first = daemon.fork(guest::ONE);
    daemon.wait_complete(guest::ONE);
    daemon.kill(&first.id).unwrap();
    let fork = daemon.fork(guest::ONE).id;
    daemon.sh(&fork, "true");
    goes_to_rest(&daemon, &fork, 30);
    let rested = private(&daemon, &fork);
    // Timers touch a page now and then.
    let mut most = rested;
    eventually(Duration::from_secs(100), "it comes to rest again by itself", || {
        let now = private(&daemon, &fork);
        most = most.max(now);
        if most > rested + (32 << 10) && now < (rested + most) / 2 {
            Ok(())
        } else {
            Err(format!("{rested} bytes at first, {most} at most, now {now}"))
        }
    });
    println!(
        "rest: {} KiB at first, {} KiB at most, then {}",
        rested >> 10,
        most >> 10,
        private(&daemon, &fork) >> 10
    );
}
