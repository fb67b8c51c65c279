use super::*;

fn origin() -> Origin {
    Origin { place: "lab".into(), host: "h".into(), kvm: "k".into(), rev: "r".into() }
}

#[test]
fn a_newer_figure_takes_the_place_of_the_older() {
    let directory = tempfile::tempdir().unwrap();
    let results = Results::new(origin(), "null", directory.path(), Vec::new()).unwrap();
    results.record("b", "ms", vec![2.0, 1.0], None).unwrap();
    results.record("a", "ms", vec![5.0], Some("note")).unwrap();
    results.record("b", "ms", vec![4.0, 3.0], None).unwrap();
    let read = figures(directory.path()).unwrap();
    assert_eq!(read.keys().collect::<Vec<_>>(), ["lab.null.a", "lab.null.b"]);
    assert_eq!((read["lab.null.b"].min, read["lab.null.b"].max), (3.0, 4.0));
    assert_eq!(samples(directory.path()).unwrap()["lab.null.b"], [3.0, 4.0]);
    assert!(results.record("c", "ms", Vec::new(), None).is_err());
}

#[test]
fn only_what_was_named_is_wanted() {
    let directory = tempfile::tempdir().unwrap();
    let wants = |only: &str, start: &str| {
        let results = Results::new(origin(), "null", directory.path(), vec![only.to_owned()]).unwrap();
        results.wants(&[start])
    };
    assert!(wants("lab.null.pool_hit.ack", "pool_hit"));
    assert!(wants("pool_hit.ack", "pool_hit"));
    assert!(wants("mem", "mem.idle"));
    assert!(!wants("mem", "pool_hit"));
    assert!(!wants("lab.debian.pool_hit", "pool_hit"));
}

#[test]
fn many_samples_are_thinned_with_their_ends_kept() {
    let values: Vec<f64> = (0..10_000).map(f64::from).collect();
    let thinned = thinned(values);
    assert_eq!(thinned.len(), MAX_SAMPLES);
    assert_eq!((thinned[0], thinned[MAX_SAMPLES - 1]), (0.0, 9999.0));
}
