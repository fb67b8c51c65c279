use super::*;

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("forkd.sock");
    // What kill -9 leaves: a name nobody serves.
    drop(UnixListener::bind(&path).unwrap());
    let listener = listen(&path).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, SOCKET_MODE);
    assert!(matches!(listen(&path), Err(Error::InUse { .. })));
    drop(listener);
    assert!(!path.exists());

    let foreign = UnixListener::bind(&path).unwrap();
    assert!(matches!(listen(&path), Err(Error::InUse { .. })));
    drop(foreign);
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    assert!(matches!(listen(&path), Err(Error::NotSocket { .. })));
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}
