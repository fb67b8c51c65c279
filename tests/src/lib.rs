//! Harness of the promise tests: a real daemon, driven over its socket and watched through `/proc`.
//!
//! A test process owns every daemon it starts; a daemon that is dropped has ended, and all its processes with it.
#![forbid(unsafe_code)]

pub mod api;
pub mod daemon;
pub mod http;
pub mod image;
mod overdue;
pub mod proc;
pub mod spec;
pub mod stuck;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

/// The `forkling-vmm` program: `$FORKLING_BIN/forkling-vmm`, or the one built beside the test.
///
/// # Panics
/// When there is none: the test cannot mean anything without it.
pub fn vmm_program() -> PathBuf {
    program("forkling-vmm")
}

/// The program `name` in `$FORKLING_BIN`, or the one built beside the test.
///
/// # Panics
/// As [`vmm_program`].
pub fn program(name: &str) -> PathBuf {
    let directory = std::env::var_os("FORKLING_BIN").map_or_else(beside_test, PathBuf::from);
    let program = directory.join(name);
    assert!(
        program.exists(),
        "{} is missing; build the workspace first or set FORKLING_BIN",
        program.display()
    );
    program
}

fn beside_test() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its program");
    test.ancestors().nth(2).expect("target/<profile>/deps/<test>").to_owned()
}

/// Waits until `condition` holds.
///
/// # Panics
/// When it does not within `patience`, with what `condition` said last.
pub fn eventually(patience: Duration, what: &str, mut condition: impl FnMut() -> Result<(), String>) {
    let start = Instant::now();
    while let Err(why) = condition() {
        assert!(start.elapsed() < patience, "not within {patience:?}: {what}; {why}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
