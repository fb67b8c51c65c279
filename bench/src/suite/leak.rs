//! What is left of forks that are gone: after 10,000 in a row, and after 1,000 at once.

use std::{collections::BTreeMap, thread, time::Duration};

use anyhow::Context as _;
use forkling_tests::proc;

use super::memory::settled;
use crate::{
    bench::{Bench, Source, TEMPLATE},
    host::kib_line,
    results::Results,
};

/// What is held, by name.
type Holdings = BTreeMap<&'static str, f64>;

/// Takes all of it, daemon and zygote.
fn holdings(bench: &mut Bench) -> anyhow::Result<Holdings> {
    bench.settle()?;
    // The next embryo is there by then: two descriptors of the daemon.
    thread::sleep(Duration::from_millis(500));
    let template = bench.connection.call("GET", &format!("/v1/templates/{TEMPLATE}"), None)?;
    let zygote = template["zygote_pid"].as_i64().context("the template has no zygote")? as i32;
    let daemon = bench.daemon.pid();
    let resident = |pid: i32| kib_line(&format!("/proc/{pid}/status"), "VmRSS").unwrap_or_default() as f64;
    let (of_daemon, of_zygote) = (proc::holdings(daemon), proc::holdings(zygote));
    Ok(BTreeMap::from([
        ("host_kib", -settled(false)),
        ("daemon_kib", resident(daemon)),
        ("zygote_kib", resident(zygote)),
        ("descriptors", (of_daemon.descriptors + of_zygote.descriptors) as f64),
        ("mappings", (of_daemon.mappings + of_zygote.mappings) as f64),
        ("threads", (of_daemon.threads + of_zygote.threads) as f64),
        ("processes", bench.daemon.children().len() as f64),
    ]))
}

fn record(results: &Results, what: &str, before: &Holdings, after: &Holdings) -> anyhow::Result<()> {
    for (name, value) in after {
        let unit = if name.ends_with("kib") { "KiB" } else { "1" };
        results.record(&format!("{what}.{name}"), unit, vec![value - before[name]], None)?;
    }
    Ok(())
}

/// Differences of before and after; memory in all, not a fork.
pub fn take(bench: &mut Bench, results: &Results, quick: bool) -> anyhow::Result<()> {
    if !results.wants(&["leak"]) || bench.lab {
        return Ok(());
    }
    bench.drop_pool()?;
    let (warm, count) = if quick { (200, 500) } else { (2000, 10_000) };
    // The records of the dead are kept up to a bound, which is reached first.
    in_a_row(bench, warm)?;
    let before = holdings(bench)?;
    in_a_row(bench, count)?;
    record(results, &format!("leak.after_{count}_in_a_row"), &before, &holdings(bench)?)?;
    let at_once = if quick { 100 } else { 1000 };
    bench.fork_many(Source::New, at_once)?;
    bench.destroy_all()?;
    let before = holdings(bench)?;
    bench.fork_many(Source::New, at_once)?;
    bench.destroy_all()?;
    record(results, &format!("leak.after_{at_once}_at_once"), &before, &holdings(bench)?)
}

fn in_a_row(bench: &mut Bench, count: usize) -> anyhow::Result<()> {
    for _ in 0..count {
        let fork = bench.fork(Source::New)?.1;
        bench.destroy(&fork)?;
    }
    Ok(())
}
