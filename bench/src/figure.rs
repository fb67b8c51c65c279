//! A figure: what was measured how often, and how it is spread.

use serde::{Deserialize, Serialize};

/// One line of `latest.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// `WHERE.GUEST.WHAT`.
    pub id: String,
    /// `ms`, `us`, `KiB`, `1/s`, `Gbit/s`, `1` (a count) or `x` (a ratio).
    pub unit: String,
    /// Samples.
    pub n: usize,
    /// Smallest.
    pub min: f64,
    /// Median.
    pub p50: f64,
    /// 99th percentile; of few samples, the largest.
    pub p99: f64,
    /// Largest.
    pub max: f64,
    /// `native` or `lab`.
    #[serde(rename = "where")]
    pub place: String,
    /// Kernel and processors.
    pub host: String,
    /// KVM's flavour.
    pub kvm: String,
    /// What was measured: commit, with `+` if there were changes.
    pub rev: String,
    /// What the id does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// Order statistics.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Smallest.
    pub min: f64,
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// Of `samples`; none if there are none. Sorts them.
    pub fn of(samples: &mut [f64]) -> Option<Self> {
        samples.sort_by(f64::total_cmp);
        let &min = samples.first()?;
        let &max = samples.last()?;
        Some(Self { min, p50: quantile(samples, 0.5), p99: quantile(samples, 0.99), max })
    }
}

/// The smallest of the sorted `samples` that at least `share` of them do not exceed (the nearest rank).
pub fn quantile(samples: &[f64], share: f64) -> f64 {
    let rank = (samples.len() as f64 * share).ceil() as usize;
    samples[rank.clamp(1, samples.len()) - 1]
}

#[cfg(test)]
mod tests;
