use super::*;

fn figure(id: &str, unit: &str, p50: f64) -> Figure {
    Figure {
        id: id.into(),
        unit: unit.into(),
        n: 3,
        min: p50,
        p50,
        p99: p50,
        max: p50,
        place: "lab".into(),
        host: "a <host>".into(),
        kvm: "svm".into(),
        rev: "r".into(),
        note: None,
    }
}

#[test]
fn a_page_has_all_drawings_and_nothing_from_elsewhere() {
    let taken = [
        figure("lab.debian.pool_miss.ack", "ms", 4.5),
        figure("lab.debian.pool_miss.phase.queue", "ms", 0.5),
        figure("lab.debian.pool_miss.phase.guest", "ms", 2.5),
        figure("lab.debian.mem.at_20", "KiB", 3000.0),
        figure("lab.debian.mem.at_200", "KiB", 2800.0),
    ];
    let figures: Figures = taken.map(|figure| (figure.id.clone(), figure)).into();
    let samples = BTreeMap::from([("lab.debian.pool_miss.ack".to_owned(), vec![4.4, 4.5, 9.0])]);
    let page = page(&figures, &samples);
    assert_eq!(page.matches("<svg").count(), 3);
    assert_eq!(page.matches("</svg>").count(), 3);
    assert!(page.contains("a &lt;host&gt;") && !page.contains("<host>"));
    assert!(!page.contains("NaN") && !page.contains("inf"));
    for outside in ["<script", "<link", "<img", "src=", "url(", "@import"] {
        assert!(!page.contains(outside), "{outside}");
    }
}
