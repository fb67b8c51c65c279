use super::*;
use std::io::Read;

#[test]
fn everyone_who_waited_gets_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("run/forkpoint.sock");
    let mut waiters = Waiters::listen_at(&path).unwrap();
    assert_eq!(waiters.gather().unwrap(), 0);
    let mut early: Vec<_> = (0..3).map(|_| UnixStream::connect(&path).unwrap()).collect();
    early.remove(1);
    assert_eq!(waiters.gather().unwrap(), 3);
    let mut late = UnixStream::connect(&path).unwrap();
    waiters.release(41);
    for stream in &mut early {
        let mut line = String::new();
        stream.read_to_string(&mut line).unwrap();
        assert_eq!(line, "generation 41\n");
    }
    late.set_nonblocking(true).unwrap();
    assert_eq!(late.read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    assert_eq!(waiters.gather().unwrap(), 1);
    waiters.release(42);
    let mut line = [0; 14];
    late.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"generation 42\n");
}
