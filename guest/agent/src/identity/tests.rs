use super::*;
use std::fs;

#[test]
fn a_slot_replaces_the_whole_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("etc/hostname");
    let mut slot = Slot::open(&path, 8).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "template\n");
    for content in ["template-with-a-long-name", "one", "", "eight ch", "eight-ch", "twelve"] {
        slot.write(format_args!("{content}\n")).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{content}\n"));
    }
    let mut again = Slot::open(&path, 8).unwrap();
    again.write(format_args!("x\n")).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "x\n");
}

#[test]
fn a_link_is_replaced_not_followed() {
    let directory = tempfile::tempdir().unwrap();
    let (target, link) = (directory.path().join("target"), directory.path().join("machine-id"));
    fs::write(&target, "of somebody else").unwrap();
    std::os::unix::fs::symlink(&target, &link).unwrap();
    Slot::open(&link, 4).unwrap().write(format_args!("mine\n")).unwrap();
    assert_eq!(fs::read_to_string(&target).unwrap(), "of somebody else");
    assert_eq!(fs::read_to_string(&link).unwrap(), "mine\n");
}

#[test]
fn what_cannot_be_opened_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let error = Slot::open(directory.path(), 4).unwrap_err();
    assert!(error.to_string().contains(directory.path().to_str().unwrap()), "{error}");
}
