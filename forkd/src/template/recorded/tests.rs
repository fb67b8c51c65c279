use super::{first_pages, set};
use crate::fork::Touched;

#[test]
fn what_a_fork_says_is_cut_to_the_image() {
    let touched =
        Touched { read: vec![(5, 2), (90, u64::MAX), (u64::MAX, u64::MAX)], write: vec![(6, 1), (100, 1)] };
    assert_eq!(set(&touched, 100).pages(), (1 + 10, 1));
    let endless = Touched { read: vec![(0, u64::MAX); 1000], write: Vec::new() };
    assert_eq!(set(&endless, 100).pages(), (100, 0));
}

#[test]
fn what_is_written_later_is_not_copied_first() {
    let of = |write: &[(u64, u64)]| set(&Touched { read: Vec::new(), write: write.to_vec() }, 100);
    let known = first_pages(&of(&[(1, 4), (10, 1)]).beginning_with(&of(&[(2, 1), (10, 5)])));
    assert_eq!((known.acknowledge, known.command), (vec![(2, 1), (10, 1)], vec![(1, 1), (3, 2)]));
}
