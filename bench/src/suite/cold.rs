//! A cold template: the daemon was restarted, the page cache dropped, the snapshot lies on its disk.

use std::{fs, process::Command};

use anyhow::{Context as _, ensure};

use super::{Phases, ladder};
use crate::{
    bench::{Bench, Source},
    results::Results,
};

/// Takes the figures; the daemon is another one after each.
pub fn take(mut bench: Bench, results: &Results, quick: bool) -> anyhow::Result<Bench> {
    if !results.wants(&["cold"]) {
        return Ok(bench);
    }
    let rounds = if quick { 1 } else { 5 };
    for step in [ladder::Step::Ack, ladder::Step::Rpc] {
        let (mut times, mut phases) = (Vec::new(), Phases::default());
        for _ in 0..rounds {
            bench = bench.restart(&[])?;
            drop_caches()?;
            // What the kernel lets go of later, a moment after it was told to, is no part of a start.
            bench.quiet();
            let (took, fork) = ladder::climb(&mut bench, Source::New, step)?;
            times.push(took);
            phases.push(&fork);
            bench.destroy(&fork)?;
        }
        let note = "daemon restarted, page cache dropped; no zygote, no other VM";
        results.record(&format!("cold.{}", step.name()), "ms", times, Some(note))?;
        if step == ladder::Step::Ack {
            phases.record(results, "cold")?;
        }
    }
    Ok(bench)
}

fn drop_caches() -> anyhow::Result<()> {
    ensure!(Command::new("sync").status().context("sync(1)")?.success(), "sync(1) failed");
    fs::write("/proc/sys/vm/drop_caches", "3").context("cannot drop the page cache; this needs root")
}
