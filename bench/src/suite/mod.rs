//! The figures, in groups that share a set-up.

mod cold;
pub mod ladder;
mod leak;
mod load;
mod memory;
mod network;
mod technique;

use crate::{
    bench::{Bench, Fork, Guest, Places},
    host,
    results::{Results, show_head},
};

/// Phases of `timings_us` in their order.
pub const PHASES: [&str; 9] =
    ["queue", "fork", "vm", "vcpus", "restore", "activate", "enter", "guest", "reply"];

/// Takes the figures that are wanted, but for cold starts.
pub fn run(places: &Places, guest: Guest, results: &Results, quick: bool) -> anyhow::Result<()> {
    let mut bench = start(places, guest, results)?;
    stages(&bench, results)?;
    bench.accompany()?;
    match guest {
        Guest::Null => null(&mut bench, results, quick)?,
        Guest::Debian => {
            debian(&mut bench, results, quick)?;
            network::take(&mut bench, places, results, quick)?;
        }
    }
    technique::embryo(bench, results, quick)?.daemon.end()
}

/// Takes the figures of cold starts.
pub fn run_cold(places: &Places, guest: Guest, results: &Results, quick: bool) -> anyhow::Result<()> {
    let bench = start(places, guest, results)?;
    cold::take(bench, results, quick)?.daemon.end()
}

fn start(places: &Places, guest: Guest, results: &Results) -> anyhow::Result<Bench> {
    let origin = &results.origin;
    println!("{}, {}, {}, load {:.2}", origin.host, origin.kvm, origin.rev, host::load());
    let bench = Bench::start(places, guest, origin.is_lab())?;
    println!("pool: {}", if bench.pools { "yes" } else { "no pool in this build" });
    show_head();
    Ok(bench)
}

fn null(bench: &mut Bench, results: &Results, quick: bool) -> anyhow::Result<()> {
    ladder::client(bench, results, quick)?;
    ladder::null(bench, results, quick)?;
    load::fan_out(bench, results, quick)?;
    load::at_once(bench, results, quick)?;
    load::cycles(bench, results, quick)?;
    load::destroy(bench, results, quick)?;
    technique::take(bench, results, quick)?;
    memory::null(bench, results, quick)?;
    leak::take(bench, results, quick)
}

fn debian(bench: &mut Bench, results: &Results, quick: bool) -> anyhow::Result<()> {
    ladder::debian(bench, results, quick)?;
    technique::take(bench, results, quick)?;
    memory::debian(bench, results, quick)
}

/// What the template's build took: baseline (d) for Debian is its boot.
fn stages(bench: &Bench, results: &Results) -> anyhow::Result<()> {
    for (stage, took) in &bench.stages {
        results.record(&format!("build.{stage}"), "ms", vec![*took], None)?;
    }
    let boot = bench.stages.iter().find(|(stage, _)| stage == "boot");
    match boot {
        Some((_, took)) if bench.guest == Guest::Debian => results.record(
            "baseline_d.cold_boot",
            "ms",
            vec![*took],
            Some("boot to the forkpoint, warm-up included"),
        ),
        _ => Ok(()),
    }
}

/// Collects the phases of forks.
#[derive(Debug, Default)]
pub struct Phases(Vec<Fork>);

impl Phases {
    /// Adds a fork's.
    pub fn push(&mut self, fork: &Fork) {
        self.0.push(fork.clone());
    }

    /// Records them as `WHAT.phase.NAME`, and the daemon's own total.
    pub fn record(&self, results: &Results, what: &str) -> anyhow::Result<()> {
        for name in PHASES.into_iter().chain(["total"]) {
            let values: Vec<f64> =
                self.0.iter().filter_map(|fork| Some(fork.timings.get(name)?.as_f64()? / 1e3)).collect();
            if !values.is_empty() {
                results.record(&format!("{what}.phase.{name}"), "ms", values, None)?;
            }
        }
        Ok(())
    }
}
