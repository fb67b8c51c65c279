//! Templates on disk cost next to nothing, those in use what they need, and those out of use give it back.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use forkling_daemon::api::types::TemplateState;
use forkling_fixtures::null_guest;
use forkling_tests::{
    daemon::{Daemon, Settings},
    eventually,
    image::{Image, checksum_on_disk},
    proc,
};
use serde_json::json;

const TEMPLATES: usize = 50;

/// Bytes behind the program that do not compress.
const NOISE: usize = 900 << 10;

const PATIENCE: Duration = Duration::from_secs(20);

fn noisy() -> Settings {
    let settings = Settings::default();
    let mut noise = vec![0; NOISE];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    fs::write(settings.null_guest(), [null_guest::PROGRAM, &noise].concat()).unwrap();
    settings
}

fn resident(daemon: &Daemon) -> u64 {
    proc::kib_field(&format!("/proc/{}/status", daemon.pid()), "RssAnon")
        .expect("a living process has a size")
}

/// Bytes of a daemon that has started, with what it does ahead of need.
fn resident_at_rest(daemon: &Daemon) -> u64 {
    std::thread::sleep(Duration::from_secs(1));
    resident(daemon)
}

fn chunk_files(directory: &Path) -> usize {
    proc::files(&directory.join("chunks")).len()
}

#[test]
fn fifty_templates_cost_a_restart_nothing() {
    let settings = noisy();
    let daemon = settings.start();
    daemon.build_null("t0");
    drop(daemon);
    let empty = resident_at_rest(&Settings::default().start());
    let templates = settings.state().join("templates");
    for number in 1..TEMPLATES {
        let (from, to) = (templates.join("t0"), templates.join(format!("t{number}")));
        assert!(Command::new("cp").arg("-al").args([from, to]).status().unwrap().success());
    }
    let before = Instant::now();
    let daemon = settings.start();
    let ready = before.elapsed();
    let taken = resident_at_rest(&daemon).saturating_sub(empty);
    println!("ready after {ready:?} with {TEMPLATES} templates; {} KiB more than with none", taken >> 10);
    assert!(ready < Duration::from_secs(1), "{ready:?}");
    assert!(taken < 4 << 20, "{taken} bytes");
    assert_eq!(daemon.templates().len(), TEMPLATES);
    // Nothing is loaded before it is used.
    daemon.settle(0);
    for name in ["t0", "t31", "t49"] {
        assert_eq!(daemon.forks(name, 2).len(), 2);
    }
    daemon.settle(9);
    let states = daemon.templates().into_iter().filter(|template| template.state == TemplateState::Ready);
    assert_eq!(states.count(), 3);
}

#[test]
fn templates_share_what_is_equal_and_outlive_each_other() {
    let settings = noisy();
    let daemon = settings.start();
    daemon.build_null("a");
    let alone = daemon.template("a").unwrap();
    // The record is written after the directory was measured.
    let own = alone.disk_unique_bytes.unwrap();
    assert!((alone.disk_bytes..alone.disk_bytes + 4096).contains(&own), "{own} of {}", alone.disk_bytes);
    daemon.build_null("b");
    let fork = daemon.fork("a");
    daemon.snapshot(&fork.id, "c").unwrap();
    daemon.kill(&fork.id).unwrap();
    let expected = checksum_on_disk(&settings.snapshot("c"));
    for name in ["a", "b", "c"] {
        let info = daemon.template(name).unwrap();
        let (all, own) = (info.disk_bytes, info.disk_unique_bytes.unwrap());
        println!("{name}: {all} bytes on disk, {own} of them its own");
        assert!(all > NOISE as u64 && own < all / 4, "{name}: {own} of {all}");
    }
    daemon.remove_template("a").unwrap();
    daemon.remove_template("b").unwrap();
    drop(daemon);
    let daemon = settings.start();
    let info = daemon.template("c").unwrap();
    assert!(info.disk_unique_bytes.unwrap() > NOISE as u64, "nobody shares with it any more");
    daemon.fork("c");
    daemon.wait_complete("c");
    assert_eq!(Image::of(daemon.zygote("c")).checksum(), expected);
    daemon.kill_all();
    assert_eq!(chunk_files(&settings.state()), chunk_files(&settings.snapshot("c")));
    daemon.remove_template("c").unwrap();
    assert_eq!(chunk_files(&settings.state()), 0, "the last template took the last chunk with it");
}

#[test]
fn a_killed_daemon_leaves_no_chunk_without_a_template() {
    let settings = noisy();
    let daemon = settings.start();
    daemon.build_null("a");
    drop(daemon);
    // As a daemon that is killed between two steps of a removal leaves it.
    fs::remove_dir_all(settings.state().join("templates/a")).unwrap();
    assert!(chunk_files(&settings.state()) > 0);
    let _daemon = settings.start();
    eventually(PATIENCE, "chunks without a template are removed", || match chunk_files(&settings.state()) {
        0 => Ok(()),
        left => Err(format!("{left} are left")),
    });
}

#[test]
fn an_idle_template_gives_its_memory_back() {
    let settings = noisy().arg("--idle-unload").arg("1");
    let daemon = settings.start();
    daemon.build_null("null");
    let fork = daemon.fork("null");
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(daemon.template("null").unwrap().state, TemplateState::Ready, "it has a fork");
    daemon.kill(&fork.id).unwrap();
    eventually(PATIENCE, "the template is unloaded", || {
        let info = daemon.template("null").unwrap();
        if info.state == TemplateState::Cold { Ok(()) } else { Err(format!("{info:?}")) }
    });
    daemon.settle(0);
    let info = daemon.template("null").unwrap();
    assert_eq!((info.resident_bytes, info.residency, info.zygote_pid), (None, None, None));
    assert_eq!(proc::holdings(daemon.pid()).memfds, 0, "its image is closed");
    assert_eq!(daemon.forks("null", 3).len(), 3, "the next use loads it again");
}

#[test]
fn a_template_is_unloaded_by_request() {
    let daemon = noisy().start();
    daemon.build_null("null");
    let forks = daemon.forks("null", 2);
    let refused = daemon.unload("null").unwrap_err();
    assert_eq!(refused.code, "template_in_use");
    for fork in &forks {
        daemon.kill(&fork.id).unwrap();
    }
    eventually(PATIENCE, "its forks are gone", || {
        daemon.unload("null").map(drop).map_err(|error| error.code)
    });
    assert_eq!(daemon.unload("null").unwrap().state, TemplateState::Cold, "once more is no error");
    daemon.settle(0);
    let residency = |daemon: &Daemon| daemon.template("null").unwrap().residency;
    assert_eq!(residency(&daemon), None);
    daemon.fork("null");
    daemon.wait_complete("null");
    let there = residency(&daemon).unwrap();
    assert!(there.data_chunks > 10 && there.fetch_ms > 0.0, "{there:?}");
    assert_eq!(there.loaded_chunks, there.data_chunks);
    assert_eq!(daemon.unload("none").unwrap_err().code, "template_not_found");
    let pool = json!({"low": 1, "high": 1});
    daemon.kill_all();
    daemon.call::<serde_json::Value>("PUT", "/v1/templates/null/pool", Some(&pool)).unwrap();
    assert_eq!(daemon.unload("null").unwrap_err().code, "template_in_use", "its pool wants it");
}

#[test]
fn a_zygote_waits_for_the_next_cold_template() {
    let (_, settings) = Daemon::with_null().stop();
    let daemon = settings.start();
    let spare = || proc::children(daemon.pid()).into_iter().find(|&pid| proc::is_spare(pid));
    let wait = |wanted: bool| {
        eventually(Duration::from_secs(20), "a zygote waits as long as a template is cold", || {
            let found = spare();
            if found.is_some() == wanted { Ok(()) } else { Err(format!("{found:?}")) }
        });
        spare()
    };
    let ahead = wait(true).unwrap();
    let anonymous = proc::kib_field(&format!("/proc/{ahead}/smaps_rollup"), "Anonymous").unwrap();
    println!("a zygote without a template has {} KiB of its own", anonymous >> 10);
    assert!(anonymous < 1 << 20, "{anonymous} bytes");
    daemon.fork("null");
    assert_eq!(daemon.zygote("null"), ahead);
    assert_eq!(wait(false), None, "no template is cold");
    daemon.kill_all();
    eventually(PATIENCE, "its forks are gone", || {
        daemon.unload("null").map(drop).map_err(|error| error.code)
    });
    // Killed, it is missed by nobody.
    proc::kill(wait(true).unwrap());
    daemon.fork("null");
}
