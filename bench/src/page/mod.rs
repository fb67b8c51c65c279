//! The page of the figures: one file, no scripts, nothing from elsewhere.

mod svg;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::Path,
};

use anyhow::{Context as _, ensure};

use crate::{figure::Figure, results, suite::PHASES};
use svg::{Cdf, Curve, Waterfall};

/// Name of the page in the directory of the figures.
const PAGE: &str = "index.html";

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222;background:#fff}\
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}svg{width:100%;height:auto}\
table{border-collapse:collapse;font-size:13px;width:100%}td,th{padding:2px 8px;text-align:right;border-bottom:1px solid #ddd}\
td:first-child,th:first-child{text-align:left;font-family:ui-monospace,monospace}td:last-child,th:last-child{text-align:left;color:#666}\
.wide{overflow-x:auto}p{color:#555}";

/// Writes the page of the figures in `directory`.
pub fn write(directory: &Path) -> anyhow::Result<()> {
    let figures = results::figures(directory)?;
    ensure!(!figures.is_empty(), "no figures in {}; take some first", directory.display());
    let samples = results::samples(directory)?;
    let path = directory.join(PAGE);
    fs::write(&path, page(&figures, &samples)).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{}", path.display());
    Ok(())
}

type Figures = BTreeMap<String, Figure>;
type AllSamples = BTreeMap<String, Vec<f64>>;

fn page(figures: &Figures, samples: &AllSamples) -> String {
    let mut html = format!(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>\
         <title>Forkling: figures</title><style>{STYLE}</style><h1>Forkling: figures</h1>"
    );
    for origin in origins(figures) {
        html += &format!("<p>{}</p>", escape(&origin));
    }
    let prefixes: BTreeSet<&str> = figures.keys().filter_map(|id| prefix(id)).collect();
    for prefix in &prefixes {
        html += &section(prefix, figures, samples);
    }
    html += "<h2>All figures</h2><div class=wide><table><tr><th>id<th>n<th>min<th>p50<th>p99<th>max<th>unit<th></tr>";
    for figure in figures.values() {
        let Figure { id, unit, n, min, p50, p99, max, note, .. } = figure;
        let note = escape(note.as_deref().unwrap_or_default());
        let numbers: String = [min, p50, p99, max].map(|value| format!("<td>{value:.3}")).concat();
        write!(html, "<tr><td>{}<td>{n}{numbers}<td>{unit}<td>{note}</tr>", escape(id))
            .expect("strings take all");
    }
    html += "</table></div>";
    html
}

/// `native.null` of `native.null.pool_hit.ack`.
fn prefix(id: &str) -> Option<&str> {
    let end = id.match_indices('.').nth(1)?.0;
    Some(&id[..end])
}

fn origins(figures: &Figures) -> BTreeSet<String> {
    let say = |figure: &Figure| {
        let Figure { place, host, kvm, rev, .. } = figure;
        let place = match place.as_str() {
            "lab" => "Lab time (one instruction = one nanosecond)",
            _ => "Native",
        };
        format!("{place}: {host}, KVM {kvm}, commit {rev}")
    };
    figures.values().map(say).collect()
}

fn section(prefix: &str, figures: &Figures, samples: &AllSamples) -> String {
    let mut html = String::new();
    let name = prefix.replace('.', ", ");
    let cdf = latencies(prefix, figures, samples);
    if !cdf.lines.is_empty() {
        html += &format!(
            "<h2>{name}: how long a fork takes</h2><p>Share of requests answered within a time.</p>"
        );
        html += &cdf.draw();
    }
    for (what, title) in [
        ("pool_hit", "a parked fork, phase by phase"),
        ("pool_miss", "a new fork, phase by phase"),
        ("cold", "a fork of a cold template, phase by phase"),
    ] {
        let p50 = |phase| figures.get(&format!("{prefix}.{what}.phase.{phase}")).map(|figure| figure.p50);
        let bars: Vec<(&str, f64)> = PHASES.iter().filter_map(|&phase| Some((phase, p50(phase)?))).collect();
        if !bars.is_empty() {
            html += &format!("<h2>{name}: {title}</h2><p>Medians, from the request's arrival.</p>");
            html += &Waterfall { bars }.draw();
        }
    }
    let curves = memory(prefix, figures);
    if curves.iter().any(|curve| curve.points.len() > 1) {
        html +=
            &format!("<h2>{name}: memory of a fork over their number</h2><p>All of the host, per fork.</p>");
        html += &svg::curves(&curves);
    }
    html
}

/// The figures of the ladder and the baselines, fastest first.
fn latencies(prefix: &str, figures: &Figures, samples: &AllSamples) -> Cdf {
    let is_ladder = |what: &str| {
        let parts: Vec<&str> = what.split('.').collect();
        let ladder = matches!(parts[..], ["pool_hit" | "pool_miss" | "cold", _]);
        ladder || matches!(parts[..], [first, "first_out"] if first.starts_with("baseline"))
    };
    let mut lines: Vec<(String, Vec<f64>)> = figures
        .values()
        .filter(|figure| figure.unit == "ms" && figure.n >= 3)
        .filter_map(|figure| {
            let what = figure.id.strip_prefix(prefix)?.strip_prefix('.')?;
            is_ladder(what).then_some(())?;
            Some((what.to_owned(), samples.get(&figure.id)?.clone()))
        })
        .collect();
    lines.sort_by(|left, right| left.1[left.1.len() / 2].total_cmp(&right.1[right.1.len() / 2]));
    Cdf { lines }
}

/// `mem.at_N` and its parts.
fn memory(prefix: &str, figures: &Figures) -> Vec<Curve> {
    let mut curves: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for figure in figures.values() {
        let Some(rest) = figure.id.strip_prefix(&format!("{prefix}.mem.at_")) else { continue };
        let (count, part) = rest.split_once('.').unwrap_or((rest, "available"));
        let Ok(count) = count.parse::<u32>() else { continue };
        curves.entry(part.replace('_', " ")).or_default().push((f64::from(count), figure.p50));
    }
    let sorted = |(name, mut points): (String, Vec<(f64, f64)>)| {
        points.sort_by(|left, right| left.0.total_cmp(&right.0));
        Curve { name, points }
    };
    curves.into_iter().map(sorted).collect()
}

/// Text for HTML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests;
