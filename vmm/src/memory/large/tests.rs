use super::worth_it;
use crate::sys::mapping::LARGE_PAGE;

const IMAGE: u64 = 8 * LARGE_PAGE;

#[test]
fn parts_that_are_read_and_not_written_are_worth_it() {
    let read = [(10, 6), (20, 2), (512, 512), (1024, 7), (3 * 512, 100)];
    let written: [&[(u64, u64)]; 2] = [&[(3 * 512 + 7, 1)], &[(5 * 512, 1)]];
    assert_eq!(worth_it(&read, &written, IMAGE), [0, LARGE_PAGE]);
}

#[test]
fn runs_over_borders_count_on_both_sides() {
    assert_eq!(worth_it(&[(504, 16)], &[], IMAGE), [0, LARGE_PAGE]);
    assert!(worth_it(&[(504, 16)], &[&[(511, 2)]], IMAGE).is_empty());
    assert!(worth_it(&[(505, 14)], &[], IMAGE).is_empty());
}

#[test]
fn what_is_outside_of_the_image_counts_nowhere() {
    assert_eq!(
        worth_it(&[(8 * 512, 512), (u64::MAX, u64::MAX), (7 * 512, u64::MAX)], &[], IMAGE),
        [7 * LARGE_PAGE]
    );
    assert!(worth_it(&[(0, 512)], &[], LARGE_PAGE - 4096).is_empty());
}
