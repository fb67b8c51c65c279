//! Harness of the promise tests.
#![forbid(unsafe_code)]

use std::path::PathBuf;

/// The `forkling-vmm` program: `$FORKLING_BIN/forkling-vmm`, or the one built beside the test.
///
/// # Panics
/// When there is none: the test cannot mean anything without it.
pub fn vmm_program() -> PathBuf {
    program("forkling-vmm")
}

fn program(name: &str) -> PathBuf {
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
