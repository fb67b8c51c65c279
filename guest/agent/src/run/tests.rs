use super::*;

fn failed(tail: &str) -> String {
    let error =
        Error::Failed { role: Role::WarmUp, line: "pip install x".into(), status: None, tail: tail.into() };
    error.to_string()
}

#[test]
fn a_failure_names_the_command_its_end_and_its_last_words() {
    assert_eq!(
        failed("no such package"),
        "warm-up command `pip install x` did not end in time and was killed; \
         its standard error ends with: no such package"
    );
    assert!(failed("").ends_with("it wrote nothing to its standard error"));
}

#[test]
fn the_end_of_a_log_is_kept_and_it_takes_no_more() {
    let log = rustix::fs::memfd_create("log", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    let long = [vec![b'x'; SHOWN], b"the end".to_vec()].concat();
    rustix::io::write(&log, &long).unwrap();
    let output = contents(&log).unwrap();
    assert_eq!(output.len(), SHOWN);
    assert!(output.ends_with(b"the end"));
    assert_eq!(rustix::io::write(&log, b"more"), Err(rustix::io::Errno::PERM));
}
