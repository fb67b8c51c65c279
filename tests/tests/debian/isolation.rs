//! What a fork writes, in memory or in files, is its own.

use std::time::Duration;

use forkling_daemon::api::types::Death;
use forkling_tests::{daemon::Daemon, eventually, image::Image, proc};
use serde_json::json;

use crate::guest;

#[test]
fn files_and_memory_of_a_fork_are_its_own() {
    let daemon = guest::daemon();
    let image = Image::of(daemon.load(guest::ONE));
    let forks = guest::forks(&daemon, guest::ONE, 3);
    let [writer, sibling, killed] = &forks[..] else { panic!("three were asked for") };
    // Complete by now or not: what is compared is what forks can see of it.
    daemon.wait_complete(guest::ONE);
    let before = image.checksum();
    let secret = "c0ffee-d15ea5e-0ddba11";
    let write = format!(
        "echo {secret} >/root/f && echo {secret} >>/etc/passwd && mkdir /srv/d && rm /usr/bin/curl \
         && head -c 8000000 /dev/urandom >/dev/shm/m && echo {secret} >/dev/shm/s && sync"
    );
    daemon.sh(&writer.id, &write);
    daemon.kill(&killed.id).unwrap();
    let later = daemon.fork(guest::ONE);
    let look = format!(
        "ls -d /root/f /srv/d /dev/shm/m /dev/shm/s 2>/dev/null; grep -c {secret} /etc/passwd; test -x /usr/bin/curl && echo curl"
    );
    let look = json!({"argv": ["bash", "-c", look]});
    for other in [sibling, &later] {
        assert_eq!(daemon.exec(&other.id, &look).unwrap().stdout, "0\ncurl\n", "in {}", other.id);
    }
    let own = daemon.exec(&writer.id, &look).unwrap().stdout;
    assert_eq!(own, "/dev/shm/m\n/dev/shm/s\n/root/f\n/srv/d\n1\n");
    assert_eq!(image.checksum(), before, "the template's memory changed");
}

#[test]
fn the_rest_live_when_one_is_killed() {
    let daemon = guest::daemon();
    let forks = guest::forks(&daemon, guest::ONE, 4);
    proc::kill(forks[1].pid.unwrap());
    let death = died(&daemon, &forks[1].id);
    assert_eq!((death.reason.as_str(), death.signal), ("signal", Some(9)), "{death:?}");
    let error = daemon.exec(&forks[1].id, &json!({"argv": ["true"]})).unwrap_err();
    assert_eq!(error.code, "fork_died");
    assert!(
        error.message.contains("signal 9") || error.cause.is_some_and(|cause| cause.contains("signal 9"))
    );
    for at in [0, 2, 3] {
        assert_eq!(daemon.sh(&forks[at].id, "echo alive"), "alive");
    }
    let during = forks[0].id.clone();
    let running = std::thread::spawn({
        let client = daemon.client.clone();
        move || client.exec(&during, &json!({"argv": ["sleep", "100"]}))
    });
    std::thread::sleep(Duration::from_millis(1500));
    proc::kill(forks[0].pid.unwrap());
    let error = running.join().unwrap().expect_err("the fork died under the command");
    assert_eq!(error.code, "fork_died", "{error:?}");
    // The answer is a matter of luck: the guest ends under the command.
    let _ = daemon.exec(&forks[2].id, &json!({"argv": ["sh", "-c", "echo b >/proc/sysrq-trigger"]}));
    let death = died(&daemon, &forks[2].id);
    assert_eq!(death.reason, "guest_stopped", "{death:?}");
    assert_eq!(daemon.sh(&forks[3].id, "echo alive"), "alive");
}

/// How a fork ended, once it has.
fn died(daemon: &Daemon, id: &str) -> Death {
    let mut death = None;
    eventually(Duration::from_secs(20), "the fork ends", || {
        death = daemon.inspect(id).unwrap().death;
        if death.is_some() { Ok(()) } else { Err("it lives".to_owned()) }
    });
    death.expect("it ended")
}
