use std::fs;

use super::{MAX_BYTES, PageRange, WorkingSet};
use crate::snapshot::fixture::{self, MEMORY};
use crate::snapshot::{Error, Snapshot, file};

const PAGES: u64 = MEMORY / 4096;

fn range(first: u64, pages: u64) -> PageRange {
    PageRange { first, pages }
}

fn refused(text: &str) -> String {
    WorkingSet::decode(text.as_bytes(), MEMORY).expect_err(text).to_string()
}

#[test]
fn pages_become_ranges_and_writes_win() {
    let set = WorkingSet::new([7, 5, 6, 5, 20, 9], [9, 8, 100]);
    assert_eq!(set.read, [range(5, 3), range(20, 1)]);
    assert_eq!(set.write, [range(8, 2), range(100, 1)]);
    assert_eq!(set.pages(), (4, 3));
    assert_eq!(set.chunks(), [0, 1, 6]);
    assert_eq!(WorkingSet { read: vec![range(15, 34)], ..WorkingSet::default() }.chunks(), [0, 1, 2, 3]);
    assert_eq!(set.to_string(), "4 pages read, 3 written");
}

#[test]
fn what_one_of_two_has_written_is_written() {
    let both = WorkingSet::new([1, 2, 9], [5, 6]).with(&WorkingSet::new([3, 5], [2, 7]));
    assert_eq!(both, WorkingSet::new([1, 3, 9], [2, 5, 6, 7]));
}

#[test]
fn it_is_written_beside_the_snapshot_and_replaced() {
    let dir = tempfile::tempdir().unwrap();
    fixture::write(dir.path());
    let snapshot = Snapshot::open(dir.path()).unwrap();
    assert_eq!(snapshot.working_set().unwrap(), None);
    for set in [WorkingSet::new([1, 2], [3]), WorkingSet::new([PAGES - 1], [0]), WorkingSet::default()] {
        // As a crash leaves it.
        fs::write(dir.path().join(".working-set.json.new"), "half").unwrap();
        set.write(dir.path()).unwrap();
        assert_eq!(snapshot.working_set().unwrap(), Some(set));
    }
    let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| !name.to_string_lossy().starts_with('.')), "{names:?}");
    Snapshot::open(dir.path()).unwrap().verify().unwrap();
}

#[test]
fn the_text_is_as_documented() {
    let set = WorkingSet::new([5, 6, 7], [9]);
    let text = br#"{"format":1,"read":[[5,3]],"write":[[9,1]]}"#;
    assert_eq!(set.encode(), text);
    assert_eq!(WorkingSet::decode(text, MEMORY).unwrap(), set);
    let set = WorkingSet::new([5], [7, 8, 9]).beginning_with(&WorkingSet::new([5, 9], [6, 7, 8]));
    let text = br#"{"format":1,"read":[[5,1]],"write":[[7,3]],"acknowledge":[[7,2]]}"#;
    assert_eq!(set.encode(), text);
    assert_eq!(WorkingSet::decode(text, MEMORY).unwrap(), set);
    assert_eq!(set.written_later(), [range(9, 1)]);
}

#[test]
fn what_it_should_not_say_is_refused() {
    for (text, why) in [
        (r#"{"format":2,"read":[],"write":[]}"#.to_owned(), "format"),
        (r#"{"format":1,"read":[]}"#.to_owned(), "write"),
        (r#"{"format":1,"read":[],"write":[],"more":1}"#.to_owned(), "more"),
        (r#"{"format":1,"read":[[5,0]],"write":[]}"#.to_owned(), "empty"),
        (r#"{"format":1,"read":[[5,-1]],"write":[]}"#.to_owned(), "-1"),
        (r#"{"format":1,"read":[[5,2],[6,1]],"write":[]}"#.to_owned(), "order"),
        (r#"{"format":1,"read":[[6,1],[5,1]],"write":[]}"#.to_owned(), "order"),
        (r#"{"format":1,"read":[[5,3]],"write":[[1,1],[7,1]]}"#.to_owned(), "both"),
        (r#"{"format":1,"read":[],"write":[[5,3]],"acknowledge":[[7,2]]}"#.to_owned(), "not written"),
        (format!(r#"{{"format":1,"read":[],"write":[[{PAGES},1]]}}"#), "outside"),
        (format!(r#"{{"format":1,"read":[[{},18446744073709551615]],"write":[]}}"#, PAGES - 1), "outside"),
        (format!(r#"{{"format":1,"read":[{}[900,1]],"write":[]}}"#, "[1,1],".repeat(70_000)), "too many"),
        ("[]".to_owned(), "expected"),
    ] {
        let said = refused(&text);
        assert!(said.contains(why), "{said:?} does not say {why:?}");
    }
}

#[test]
fn a_file_without_an_end_is_not_read_to_it() {
    let dir = tempfile::tempdir().unwrap();
    fixture::write(dir.path());
    fs::write(dir.path().join(file::WORKING_SET), vec![b' '; MAX_BYTES as usize + 1]).unwrap();
    let snapshot = Snapshot::open(dir.path()).unwrap();
    assert!(matches!(snapshot.working_set(), Err(Error::Damaged { .. })));
}
