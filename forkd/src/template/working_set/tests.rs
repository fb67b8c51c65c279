use super::without;

#[test]
fn what_is_known_is_left_out_and_neighbours_are_joined() {
    assert_eq!(without(&[(1, 4), (10, 1)], &[(2, 1), (10, 5)]), [(1, 1), (3, 2)]);
    assert_eq!(without(&[(1, 2), (3, 2)], &[]), [(1, 4)]);
    assert_eq!(without(&[], &[(1, 1)]), []);
}
