use super::*;

fn figure(p50: f64, unit: &str) -> Figure {
    Figure {
        id: "lab.null.pool_miss.ack".into(),
        unit: unit.into(),
        n: 1,
        min: p50,
        p50,
        p99: p50,
        max: p50,
        place: "lab".into(),
        host: String::new(),
        kvm: String::new(),
        rev: String::new(),
        note: None,
    }
}

#[test]
fn growth_beyond_three_per_cent_fails() {
    let gated = Gated { unit: "ms".into(), p50: 2.0, allowed: None };
    assert!(matches!(verdict(&gated, Some(&figure(2.07, "ms"))), Verdict::Worse(_)));
    assert!(matches!(verdict(&gated, Some(&figure(2.05, "ms"))), Verdict::Same(_)));
    assert!(matches!(verdict(&gated, Some(&figure(1.9, "ms"))), Verdict::Better(_)));
    assert_eq!(verdict(&gated, None), Verdict::Missing);
    assert_eq!(verdict(&gated, Some(&figure(2.0, "KiB"))), Verdict::Missing);
}

#[test]
fn a_baseline_may_let_more_pass_but_not_anything() {
    let gated = Gated { unit: "ms".into(), p50: 2.0, allowed: Some(0.08) };
    assert!(matches!(verdict(&gated, Some(&figure(2.15, "ms"))), Verdict::Same(_)));
    assert!(matches!(verdict(&gated, Some(&figure(2.17, "ms"))), Verdict::Worse(_)));
    let directory = tempfile::tempdir().unwrap();
    let baseline = directory.path().join("baseline.json");
    let code = |allowed: &str| {
        let text =
            format!(r#"{{"lab.null.pool_miss.ack": {{"unit": "ms", "p50": 2.0, "allowed": {allowed}}}}}"#);
        fs::write(&baseline, text).unwrap();
        run(&Args { baseline: baseline.clone(), update: false }, directory.path())
    };
    results::merge(directory.path(), &[figure(2.15, "ms")], &[]).unwrap();
    assert_eq!(code("0.08").unwrap(), ExitCode::SUCCESS);
    assert_eq!(code("0.05").unwrap(), ExitCode::FAILURE);
    code("5").unwrap_err();
}

#[test]
fn the_gate_fails_when_a_figure_is_worse_or_missing() {
    let directory = tempfile::tempdir().unwrap();
    let baseline = directory.path().join("baseline.json");
    fs::write(&baseline, r#"{"lab.null.pool_miss.ack": {"unit": "ms", "p50": 2.0}}"#).unwrap();
    let code = |update| run(&Args { baseline: baseline.clone(), update }, directory.path());
    assert_eq!(code(false).unwrap(), ExitCode::FAILURE);
    results::merge(directory.path(), &[figure(2.1, "ms")], &[]).unwrap();
    assert_eq!(code(false).unwrap(), ExitCode::FAILURE);
    code(true).unwrap();
    assert_eq!(code(false).unwrap(), ExitCode::SUCCESS);
}
