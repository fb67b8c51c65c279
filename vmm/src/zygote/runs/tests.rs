//! Runs are joined where nothing lies between that has to stay.

use super::joined;

#[test]
fn neighbours_are_joined_across_what_nobody_reads() {
    assert_eq!(joined(&[&[(10, 2)], &[(20, 1)]], &[]), [(10, 11)]);
    assert_eq!(joined(&[&[(10, 2)], &[(20, 1)]], &[(15, 1)]), [(10, 2), (20, 1)]);
    assert_eq!(joined(&[&[(10, 2), (20, 1)]], &[(12, 1)]), [(10, 2), (20, 1)]);
    assert_eq!(joined(&[&[(10, 2), (20, 1)]], &[(19, 1)]), [(10, 2), (20, 1)]);
    assert_eq!(joined(&[&[(10, 2), (20, 1)]], &[(5, 5), (21, 9)]), [(10, 11)]);
}

#[test]
fn runs_may_come_in_any_order_overlap_and_be_empty() {
    assert_eq!(joined(&[&[(20, 4), (22, 1)], &[(10, 2), (3, 0)]], &[(15, 1)]), [(10, 2), (20, 4)]);
    assert_eq!(joined(&[], &[(1, 1)]), []);
}

#[test]
fn what_is_read_and_written_is_written() {
    assert_eq!(joined(&[&[(10, 2), (12, 3)]], &[(11, 2)]), [(10, 5)]);
}
