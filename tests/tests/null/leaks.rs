//! A thousand forks later the daemon holds what it held after ten.

use std::time::Duration;

use forkling_tests::{daemon::Daemon, eventually, proc};

/// Everything that must not grow.
#[derive(Debug, PartialEq)]
struct Census {
    daemon: proc::Holdings,
    zygote: proc::Holdings,
    files: Vec<(std::path::PathBuf, u64)>,
}

fn census(daemon: &Daemon) -> Census {
    let files = proc::files(daemon.settings.path());
    // The log is meant to grow, and the generation mark counts up.
    let counted = |path: &std::path::Path| !path.ends_with("log") && !path.ends_with("generation");
    Census {
        daemon: proc::holdings(daemon.pid()),
        zygote: proc::holdings(daemon.zygote("null")),
        files: files.into_iter().filter(|(path, _)| counted(path)).collect(),
    }
}

fn cycle(daemon: &Daemon, count: u32) {
    let forks = daemon.forks("null", count);
    for fork in forks {
        daemon.kill(&fork.id).unwrap();
    }
}

#[test]
fn a_thousand_cycles_leave_what_ten_left() {
    let daemon = Daemon::with_null();
    for _ in 0..4 {
        cycle(&daemon, 10);
    }
    daemon.wait_complete("null");
    daemon.settle(1);
    eventually(Duration::from_secs(20), "an embryo is there, as it will be in the end", || {
        let found = daemon.embryos();
        if found.len() == 1 { Ok(()) } else { Err(format!("{found:?}")) }
    });
    // Idle threads of the runtime come and go; their number has an end, which a burst reaches.
    std::thread::sleep(Duration::from_secs(1));
    let before = census(&daemon);
    for _ in 0..100 {
        cycle(&daemon, 10);
    }
    daemon.settle(1);
    eventually(Duration::from_secs(20), "nothing has grown", || {
        let after = census(&daemon);
        let grown = after.daemon.descriptors > before.daemon.descriptors
            || after.daemon.memfds > before.daemon.memfds
            || after.daemon.mappings > before.daemon.mappings + 4 * THREADS
            || after.daemon.threads > before.daemon.threads + THREADS
            || after.zygote != before.zygote
            || after.files != before.files;
        if grown { Err(format!("before {before:?}, after {after:?}")) } else { Ok(()) }
    });
}

/// Threads of the runtime's blocking pool that may be waiting for work, each with stack, guard and allocator arena.
const THREADS: usize = 2;
