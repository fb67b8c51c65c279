use super::*;

#[test]
fn what_was_written_is_read_and_what_is_none_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(read(directory.path()).unwrap(), None);
    let settings = PoolSettings { low: 2, high: 5, keep_writes: false, ..PoolSettings::default() };
    replace(directory.path(), &settings).unwrap();
    assert_eq!(read(directory.path()).unwrap(), Some(settings));
    for text in ["", "{\"low\": 3}", "{\"low\": 7, \"high\": 5}", "7"] {
        fs::write(directory.path().join(FILE), text).unwrap();
        read(directory.path()).unwrap_err();
    }
}
