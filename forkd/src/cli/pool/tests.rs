use super::*;

fn asked(low: Option<u32>, high: Option<u32>) -> Pool {
    Pool { name: "t".to_owned(), low, high, rehearsal: None, keep_writes: None, pre_fault: None }
}

#[test]
fn what_is_not_given_stays() {
    let now = PoolInfo { low: 4, high: 8, rehearsal: types::Rehearsal::Off, ..PoolInfo::default() };
    assert_eq!(asked(None, None).settings(&now), None);
    let set = |low, high| {
        let settings = asked(low, high).settings(&now).unwrap();
        assert_eq!((settings.rehearsal, settings.keep_writes), (types::Rehearsal::Off, false));
        (settings.low, settings.high)
    };
    assert_eq!(set(Some(2), None), (2, 8));
    assert_eq!(set(Some(20), None), (20, 20));
    assert_eq!(set(None, Some(2)), (2, 2));
    assert_eq!(set(Some(1), Some(3)), (1, 3));
}

#[test]
fn a_first_pool_has_the_defaults() {
    let settings = asked(Some(4), None).settings(&PoolInfo::default()).unwrap();
    assert_eq!(settings, PoolSettings { low: 4, high: 4, ..PoolSettings::default() });
}
