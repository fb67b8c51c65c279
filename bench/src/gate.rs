//! The gate: figures of the lab may not grow by more than 3 % over a committed baseline, or by what the baseline says for a figure that
//! repeats less well.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};

use crate::{figure::Figure, results};

/// Growth that is let pass, as a share, where the baseline names no other; lab time repeats to a fraction of a per cent.
const ALLOWED: f64 = 0.03;

/// Most that a baseline may let pass.
const MOST_ALLOWED: f64 = 0.1;

/// Arguments of `gate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The committed file
    baseline: PathBuf,
    /// Write the medians of now into it instead of comparing
    #[arg(long)]
    update: bool,
}

/// A gated figure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gated {
    /// Its unit.
    pub unit: String,
    /// Its median when the baseline was taken.
    pub p50: f64,
    /// Growth that is let pass, as a share: what it differs by from one template to the next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed: Option<f64>,
}

impl Gated {
    fn allowed(&self) -> f64 {
        self.allowed.unwrap_or(ALLOWED)
    }
}

/// The committed file: gated figures by id.
type Baseline = BTreeMap<String, Gated>;

/// How a figure compares with its baseline.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Verdict {
    /// It was not taken.
    Missing,
    /// It grew by more than is let pass.
    Worse(f64),
    /// It shrank so much that the baseline should be lowered.
    Better(f64),
    /// About the same.
    Same(f64),
}

fn verdict(gated: &Gated, now: Option<&Figure>) -> Verdict {
    let Some(now) = now.filter(|now| now.p50.is_finite() && now.unit == gated.unit) else {
        return Verdict::Missing;
    };
    let ratio = now.p50 / gated.p50;
    if ratio > 1.0 + gated.allowed() {
        Verdict::Worse(ratio)
    } else if ratio < 1.0 - gated.allowed() {
        Verdict::Better(ratio)
    } else {
        Verdict::Same(ratio)
    }
}

/// Compares the figures in `directory` with the baseline.
pub fn run(args: &Args, directory: &Path) -> anyhow::Result<ExitCode> {
    let path = &args.baseline;
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut baseline: Baseline =
        serde_json::from_str(&text).with_context(|| format!("{} is no baseline", path.display()))?;
    ensure!(!baseline.is_empty(), "{} gates nothing", path.display());
    for (id, gated) in &baseline {
        let allowed = gated.allowed();
        ensure!((0.0..=MOST_ALLOWED).contains(&allowed), "{id} may grow by {allowed}; 0 to {MOST_ALLOWED}");
    }
    let figures = results::figures(directory)?;
    if args.update {
        for (id, gated) in &mut baseline {
            let now = figures.get(id).with_context(|| format!("{id} was not taken"))?;
            gated.p50 = (now.p50 * 1e4).round() / 1e4;
        }
        fs::write(path, serde_json::to_string_pretty(&baseline)? + "\n")?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut failed = 0;
    for (id, gated) in &baseline {
        let verdict = verdict(gated, figures.get(id));
        failed += usize::from(matches!(verdict, Verdict::Worse(_) | Verdict::Missing));
        println!("{:40} {}", id, describe(verdict, gated));
    }
    let passed = baseline.len() - failed;
    let word = if failed == 0 { "ok" } else { "FAILED" };
    // The words of the test runners, so that whoever counts those counts this.
    println!(
        "\ntest result: {word}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out"
    );
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn describe(verdict: Verdict, gated: &Gated) -> String {
    let Gated { unit, p50, .. } = gated;
    let changed =
        |ratio: f64| format!("{:.4} {unit}, {:+.1} % of {p50} {unit}", p50 * ratio, (ratio - 1.0) * 100.0);
    match verdict {
        Verdict::Missing => "FAILED: it was not taken".to_owned(),
        Verdict::Worse(ratio) => {
            format!("FAILED: {}; {:.0} % are let pass", changed(ratio), gated.allowed() * 100.0)
        }
        Verdict::Better(ratio) => format!("ok: {}; lower the baseline: bench/gate --update", changed(ratio)),
        Verdict::Same(ratio) => format!("ok: {}", changed(ratio)),
    }
}

#[cfg(test)]
mod tests;
