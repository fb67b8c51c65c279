use super::*;

#[test]
fn quantiles_are_samples() {
    let mut samples: Vec<f64> = (1..=200).rev().map(f64::from).collect();
    assert_eq!(Spread::of(&mut samples), Some(Spread { min: 1.0, p50: 100.0, p99: 198.0, max: 200.0 }));
    assert_eq!(Spread::of(&mut [3.0]), Some(Spread { min: 3.0, p50: 3.0, p99: 3.0, max: 3.0 }));
    assert_eq!(Spread::of(&mut []), None);
}

#[test]
fn figures_are_read_as_written() {
    let line = r#"{"id":"native.null.a","unit":"ms","n":3,"min":1.0,"p50":2.0,"p99":3.0,"max":3.0,"where":"native","host":"h","kvm":"k","rev":"r"}"#;
    let figure: Figure = serde_json::from_str(line).unwrap();
    assert_eq!(figure.place, "native");
    assert_eq!(serde_json::to_string(&figure).unwrap(), line);
}
