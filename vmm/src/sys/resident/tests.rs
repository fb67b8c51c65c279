use std::io::Write as _;

use super::ResidentProgram;

#[test]
fn what_runs_is_kept_and_symbols_are_not() {
    let path = std::env::current_exe().unwrap();
    let resident = ResidentProgram::new(&path).unwrap();
    let all = std::fs::metadata(&path).unwrap().len();
    assert!(resident.len() as u64 > 100_000 && (resident.len() as u64) < all, "{} of {all}", resident.len());
}

#[test]
fn other_files_are_refused() {
    for bytes in [
        &b""[..],
        b"#!/bin/sh",
        &[0x7f; 200],
        b"\x7fELF\x01",
        &[b"\x7fELF\x02".as_slice(), &[255; 200]].concat(),
    ] {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        assert!(ResidentProgram::new(file.path()).is_err());
    }
}
