use std::fs;

use super::{growth::Forecast, host::OWN_TASKS, ledger::Ledger, *};

const MIB: u64 = 1 << 20;

fn room(available_mib: u64, tasks: u64) -> Room {
    Room { available: available_mib * MIB, reserve: 100 * MIB, tasks, own_tasks: u64::MAX, bounds: "a limit" }
}

fn need(mib: u64) -> Need {
    Need { memory: mib * MIB, tasks: 3, cold: true }
}

#[test]
fn no_more_is_granted_than_there_is() {
    let mut ledger = Ledger::new(room(150, 1000));
    for _ in 0..5 {
        ledger.grant(&need(10), 100).unwrap();
    }
    assert_eq!(ledger.grant(&need(10), 100), Err(Limit::Memory));
    ledger.settle(&need(10), false);
    ledger.grant(&need(10), 100).unwrap();
    assert_eq!(ledger.grant(&need(10), 100), Err(Limit::Memory), "what failed is free again, once");
    ledger.settle(&need(10), true);
    assert_eq!(ledger.grant(&need(10), 100), Err(Limit::Memory), "what was made is taken");
}

#[test]
fn processes_and_the_queue_are_bounds_too() {
    let mut ledger = Ledger::new(room(10_000, 7));
    ledger.grant(&need(1), 100).unwrap();
    ledger.grant(&need(1), 100).unwrap();
    assert_eq!(ledger.grant(&need(1), 100), Err(Limit::Processes));
    let mut ledger = Ledger::new(room(10_000, 1000));
    ledger.grant(&need(1), 1).unwrap();
    assert_eq!(ledger.grant(&need(1), 1), Err(Limit::Queue));
    ledger.grant(&Need { cold: false, ..need(1) }, 1).unwrap();
    ledger.settle(&need(1), true);
    ledger.grant(&need(1), 1).unwrap();
}

#[test]
fn a_look_replaces_what_was_granted_but_not_what_is_pending() {
    let mut ledger = Ledger::new(room(130, 1000));
    ledger.grant(&need(10), 100).unwrap();
    ledger.grant(&need(10), 100).unwrap();
    ledger.settle(&need(10), true);
    // One is made and may still take 5 MiB, one is under way.
    ledger.looked(room(125, 1000), 5 * MIB, 3, 0, Duration::from_millis(100));
    ledger.grant(&need(10), 100).unwrap();
    assert_eq!(ledger.grant(&need(1), 100), Err(Limit::Memory));
}

#[test]
fn a_users_own_limit_counts_the_forks_that_live() {
    let mut ledger = Ledger::new(room(1000, 1000));
    ledger.looked(Room { own_tasks: 50, ..room(1000, 1000) }, 0, 45, 0, Duration::from_millis(100));
    assert_eq!((ledger.room.tasks, ledger.room.bounds), (5, OWN_TASKS));
    ledger.grant(&need(1), 100).unwrap();
    assert_eq!(ledger.grant(&need(1), 100), Err(Limit::Processes));
}

#[test]
fn when_to_come_back_follows_what_was_seen() {
    let mut ledger = Ledger::new(room(1000, 1000));
    assert_eq!(ledger.rates.until_ended(1), 5, "nothing is known");
    for second in 1..10 {
        ledger.looked(room(1000, 1000), 0, 0, second * 20, Duration::from_secs(1));
    }
    assert_eq!(ledger.rates.until_ended(1), 1);
    assert_eq!(ledger.rates.until_ended(100), 6);
    assert_eq!(ledger.rates.until_ended(u64::MAX), 60);
}

#[test]
fn forecasts_follow_most_forks_and_not_a_single_one() {
    let settings = Settings { growth: MIB, factor: 2.0, ..Settings::default() };
    let mut forecast = Forecast::default();
    assert_eq!(forecast.of("t", &settings, 256), Growth { ahead: MIB, held: 0 });
    for _ in 0..100 {
        forecast.saw("t", 10 * MIB);
    }
    assert_eq!(forecast.of("t", &settings, 256), Growth { ahead: 20 * MIB, held: 10 * MIB });
    assert_eq!(forecast.of("t", &settings, 256).outstanding(), 10 * MIB);
    assert_eq!(forecast.of("t", &settings, 12).ahead, 12 * MIB, "no fork takes more than it has");
    forecast.saw("t", 50 * MIB);
    assert!(forecast.of("t", &settings, 256).ahead < 40 * MIB);
    for _ in 0..30 {
        forecast.saw("t", 50 * MIB);
    }
    assert!(forecast.of("t", &settings, 256).ahead > 95 * MIB);
    // Young forks hold little; that says nothing of what they will take.
    for _ in 0..100 {
        forecast.saw("t", MIB);
    }
    assert!(forecast.of("t", &settings, 256).ahead > 70 * MIB);
    forecast.retain(|_| false);
    assert_eq!(forecast.of("t", &settings, 256).ahead, MIB);
}

/// A host of files.
fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
    let root = tempfile::tempdir().unwrap();
    for (path, text) in files {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    let host = Host::new(root.path().to_owned(), None);
    (root, host)
}

const MEMORY: (&str, &str) =
    ("proc/meminfo", "MemTotal:       33554432 kB\nMemFree:  1 kB\nMemAvailable:   16777216 kB\n");

#[test]
fn the_host_is_read() {
    let (_root, host) = host(&[
        MEMORY,
        ("proc/loadavg", "0.1 0.2 0.3 2/1000 4711\n"),
        ("proc/sys/kernel/pid_max", "32768\n"),
        ("proc/sys/kernel/threads-max", "100000\n"),
        ("proc/12/statm", "70000 900 300 10 0 500 0\n"),
    ]);
    let room = host.look();
    assert_eq!((room.available, room.reserve), (16 << 30, 1 << 30));
    assert_eq!((room.tasks, room.bounds), (32768 - 1000 - 128, "kernel.pid_max"));
    assert_eq!(host.held(12), Some(600 * 4096));
    assert_eq!(host.held(13), None);
}

#[test]
fn control_groups_of_version_2_bound_it() {
    let (_root, host) = host(&[
        MEMORY,
        ("proc/self/cgroup", "0::/system.slice/forkd.service\n"),
        ("sys/fs/cgroup/system.slice/memory.max", "max\n"),
        ("sys/fs/cgroup/system.slice/memory.current", "5\n"),
        ("sys/fs/cgroup/system.slice/pids.max", "300\n"),
        ("sys/fs/cgroup/system.slice/pids.current", "100\n"),
        ("sys/fs/cgroup/system.slice/forkd.service/memory.max", "4294967296\n"),
        ("sys/fs/cgroup/system.slice/forkd.service/memory.current", "3221225472\n"),
        (
            "sys/fs/cgroup/system.slice/forkd.service/memory.stat",
            "anon 5\ninactive_file 1073741824\nshmem 7\n",
        ),
    ]);
    let room = host.look();
    assert_eq!(room.available, 2 << 30, "what caches files can be had");
    assert_eq!((room.tasks, room.bounds), (200 - 32, "pids.max of the control group"));
}

#[test]
fn control_groups_of_version_1_bound_it() {
    let (_root, host) = host(&[
        MEMORY,
        ("proc/self/cgroup", "8:pids:/a\n4:memory:/a/b\n1:cpu,cpuacct:/\n0::/\n"),
        ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
        ("sys/fs/cgroup/memory/memory.usage_in_bytes", "9\n"),
        ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "1073741824\n"),
        ("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "536870912\n"),
        ("sys/fs/cgroup/pids/a/pids.max", "64\n"),
        ("sys/fs/cgroup/pids/a/pids.current", "60\n"),
    ]);
    let room = host.look();
    assert_eq!(room.available, 512 * MIB);
    assert_eq!(room.tasks, 0, "the last ones are the daemon's own");
}

#[test]
fn a_host_that_says_nothing_has_no_bounds() {
    let (_root, host) = host(&[]);
    let mut ledger = Ledger::new(host.look());
    ledger.grant(&need(1 << 20), 1).unwrap();
}
