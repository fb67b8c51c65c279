use super::without;

#[test]
fn what_is_known_is_left_out_and_neighbours_are_joined() {
    assert_eq!(without(&[(1, 4), (10, 1)], &[(2, 1), (10, 5)], 100), [(1, 1), (3, 2)]);
    assert_eq!(without(&[(1, 2), (3, 2)], &[], 100), [(1, 4)]);
    assert_eq!(without(&[], &[(1, 1)], 100), []);
}

#[test]
fn a_fork_cannot_name_more_pages_than_there_are() {
    assert_eq!(without(&[(8, u64::MAX), (u64::MAX, 7)], &[], 10), [(8, 2)]);
    assert_eq!(without(&[(0, 10); 4096], &[(0, u64::MAX)], 10), []);
}
