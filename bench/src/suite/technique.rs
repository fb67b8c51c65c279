//! What each technique buys and costs: a parked fork's rehearsal and the pages it keeps; the embryo of forks made from nothing.

use std::time::Instant;

use super::{
    Phases,
    ladder::{Step, climb},
    memory::{record_private, settled},
};
use crate::{
    bench::{Bench, Guest, Source},
    host,
    pool::Pool,
    results::Results,
};

/// Rehearsals, and whether what they wrote is kept. Without one nothing was written.
const ARMS: [(&str, bool); 5] =
    [("off", false), ("acknowledge", false), ("acknowledge", true), ("command", false), ("command", true)];

/// Time to park, memory, acknowledgement and first command of each arm.
pub fn take(bench: &mut Bench, results: &Results, quick: bool) -> anyhow::Result<()> {
    if !results.wants(&["technique"]) {
        return Ok(());
    }
    if !bench.pools {
        results.skip("technique", "no pool in this build");
        return Ok(());
    }
    let (depth, rounds) = match (bench.lab, quick) {
        (_, true) => (4, 3),
        (true, false) => (16, 10),
        (false, false) => (64, 500),
    };
    for (rehearsal, keep_writes) in ARMS {
        let kept = if keep_writes { "keep_writes" } else { "bare" };
        let what = format!("technique.{rehearsal}.{kept}");
        // The null guest runs no commands.
        let possible = bench.guest == Guest::Debian || rehearsal != "command";
        if possible && results.wants(&[&what]) {
            arm(bench, results, &what, Pool { rehearsal, keep_writes, ..Pool::of(depth) }, rounds)?;
        }
    }
    // Everywhere else all arms are without it.
    if host::can_pre_fault() {
        for rehearsal in ["off", "acknowledge"] {
            let what = format!("technique.{rehearsal}.no_pre_fault");
            let pool = Pool { rehearsal, pre_fault: false, ..Pool::of(depth) };
            arm(bench, results, &what, pool, rounds)?;
        }
    }
    bench.drop_pool()
}

/// What an embryo holds, and what forks made from nothing take without one, as all but the first of a burst do. The daemon is another
/// one then.
pub fn embryo(mut bench: Bench, results: &Results, quick: bool) -> anyhow::Result<Bench> {
    if !results.wants(&["technique.embryo", "technique.no_embryo"]) {
        return Ok(bench);
    }
    let Some(pid) = bench.daemon.embryo() else {
        results.skip("technique.embryo", "no embryo in this build");
        return Ok(bench);
    };
    record_private(results, "technique.embryo", &[pid])?;
    bench = bench.restart(&["--no-embryo"])?;
    bench.complete()?;
    bench.accompany()?;
    let rounds = match (bench.lab, quick) {
        (true, _) => 10,
        (false, true) => 200,
        (false, false) => 2000,
    };
    for &step in steps(bench.guest) {
        let (mut times, mut phases) = (Vec::new(), Phases::default());
        for _ in 0..rounds {
            let (took, fork) = climb(&mut bench, Source::New, step)?;
            times.push(took);
            phases.push(&fork);
            bench.destroy(&fork)?;
        }
        results.record(&format!("technique.no_embryo.{}", step.name()), "ms", times, None)?;
        if step == Step::Ack {
            phases.record(results, "technique.no_embryo")?;
        }
    }
    Ok(bench)
}

/// How far up the ladder a technique shows.
fn steps(guest: Guest) -> &'static [Step] {
    match guest {
        Guest::Null => &[Step::Ack],
        Guest::Debian => &[Step::Ack, Step::ExecTrue],
    }
}

fn arm(bench: &mut Bench, results: &Results, what: &str, pool: Pool, rounds: usize) -> anyhow::Result<()> {
    bench.drop_pool()?;
    let before = settled(bench.lab);
    let began = Instant::now();
    bench.set_pool(pool)?;
    bench.wait_parked(pool.high)?;
    let took = began.elapsed().as_secs_f64() * 1e3 / pool.high as f64;
    let note = format!("over {} of them, one after the other", pool.high);
    results.record(&format!("{what}.park"), "ms", vec![took], Some(&note))?;
    let memory = (before - settled(bench.lab)) / pool.high as f64;
    results.record(&format!("{what}.mem"), "KiB", vec![memory], Some(&note))?;
    for &step in steps(bench.guest) {
        let mut times = Vec::new();
        for _ in 0..rounds {
            bench.hold_one(pool)?;
            let (took, fork) = climb(bench, Source::Pool, step)?;
            if fork.parked {
                times.push(took);
            }
            bench.destroy(&fork)?;
        }
        results.record(&format!("{what}.{}", step.name()), "ms", times, None)?;
    }
    Ok(())
}
