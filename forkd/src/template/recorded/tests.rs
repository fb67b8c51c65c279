use super::set;
use crate::fork::Touched;

#[test]
fn what_a_fork_says_is_cut_to_the_image() {
    let touched =
        Touched { read: vec![(5, 2), (90, u64::MAX), (u64::MAX, u64::MAX)], write: vec![(6, 1), (100, 1)] };
    let set = set(&touched, 100);
    assert_eq!(set.pages(), (1 + 10, 1));
    let endless = Touched { read: vec![(0, u64::MAX); 1000], write: Vec::new() };
    assert_eq!(super::set(&endless, 100).pages(), (100, 0));
}
