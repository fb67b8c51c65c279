//! An ordinary user in group kvm needs nothing more.

use std::{os::unix::fs::MetadataExt, process::Command};

use forkling_tests::daemon::Settings;

use crate::guest::{self, Witness};

/// A user that owns nothing.
const USER: u32 = 1000;

#[test]
fn a_user_in_group_kvm_can_fork() {
    if !rustix::process::geteuid().is_root() {
        println!("shown by all these tests: they run as an ordinary user");
        return;
    }
    let group = std::fs::metadata("/dev/kvm").unwrap().gid();
    drop(guest::daemon());
    let from = guest::settings().state().join("templates").join(guest::ONE);
    let settings = Settings::default().as_user(USER, group);
    let to = settings.state().join("templates");
    std::fs::create_dir_all(&to).unwrap();
    assert!(Command::new("cp").arg("-a").args([&from, &to]).status().unwrap().success());
    settings.give_away();
    let daemon = settings.start();
    assert_eq!(std::fs::metadata(format!("/proc/{}", daemon.pid())).unwrap().uid(), USER);
    let fork = daemon.fork(guest::ONE);
    assert_eq!(std::fs::metadata(format!("/proc/{}", fork.pid.unwrap())).unwrap().uid(), USER);
    assert_eq!(Witness::ask(&daemon, &fork.id).hostname, fork.hostname);
    println!("unprivileged: lazy loading {}", daemon.health().lazy_loading);
    daemon.build_null("null");
    assert_eq!(guest::forks(&daemon, "null", 4).len(), 4);
}
