use std::{fs::File, os::unix::fs::FileExt};

use super::{copy_root, worth_it};
use crate::sys::mapping::{LARGE_PAGE, Mapping};

const IMAGE: u64 = 8 * LARGE_PAGE;

#[test]
fn parts_that_are_read_and_not_written_are_worth_it() {
    let read = [(10, 3), (20, 1), (512, 512), (1024, 3), (3 * 512, 100)];
    let written: [&[(u64, u64)]; 2] = [&[(3 * 512 + 7, 1)], &[(5 * 512, 1)]];
    assert_eq!(worth_it(&read, &written, IMAGE), [0, LARGE_PAGE]);
}

#[test]
fn runs_over_borders_count_on_both_sides() {
    assert_eq!(worth_it(&[(508, 8)], &[], IMAGE), [0, LARGE_PAGE]);
    assert_eq!(worth_it(&[(508, 8)], &[&[(511, 2)]], IMAGE), []);
    assert_eq!(worth_it(&[(509, 6)], &[], IMAGE), []);
}

#[test]
fn what_is_outside_of_the_image_counts_nowhere() {
    assert_eq!(
        worth_it(&[(8 * 512, 512), (u64::MAX, u64::MAX), (7 * 512, u64::MAX)], &[], IMAGE),
        [7 * LARGE_PAGE]
    );
    assert_eq!(worth_it(&[(0, 512)], &[], LARGE_PAGE - 4096), []);
}

#[test]
fn copied_parts_of_a_root_read_as_before() {
    let file = tempfile::tempfile().unwrap();
    let contents: Vec<u8> = (0..3 * LARGE_PAGE).map(|at| (at >> 12) as u8 ^ at as u8).collect();
    file.write_all_at(&contents, 0).unwrap();
    let root = Mapping::read_only(&file, contents.len()).unwrap();
    assert_eq!(copy_root(root, &[(512, 63)]).unwrap(), 0);
    assert_eq!(copy_root(root, &[(3, 64), (2 * 512 + 100, 400)]).unwrap(), 2);
    let mut bytes = vec![0; contents.len()];
    root.read(0, &mut bytes);
    assert!(bytes == contents);
    // The copies are what is seen.
    File::write_all_at(&file, &[!contents[0]], 0).unwrap();
    root.read(0, &mut bytes[..1]);
    assert_eq!(bytes[0], contents[0]);
}
