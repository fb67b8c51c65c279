//! Memory of forks: what the host has less of, and where the kernel says it went.

use std::{fs, hint::black_box, thread, time::Duration};

use crate::{
    bench::{Bench, Fork, Guest, Source},
    host::{kib_line, meminfo},
    pool::Pool,
    results::Results,
};

/// How long idle forks are left alone before they are looked at: what a network does after an address is set, and the
/// `--trim-after` of the daemon.
const REST: Duration = Duration::from_secs(8);

/// Lines of `/proc/meminfo` that forks grow, besides MemAvailable, with their names in figure ids.
const LINES: [(&str, &str); 5] = [
    ("PageTables", "page_tables"),
    ("SecPageTables", "sec_page_tables"),
    ("Slab", "slab"),
    ("KernelStack", "kernel_stack"),
    ("AnonPages", "anonymous"),
];

/// MemAvailable in KiB once it stands still; with `few` forks to come, to the last of them.
pub fn settled(few: bool) -> f64 {
    const SLACK: u64 = 256;
    let read = || {
        if few {
            empty_lists();
        }
        // Counters of the kernel lag behind by some hundred KiB per CPU; not being root is no reason to stop.
        let _ = fs::write("/proc/sys/vm/stat_refresh", "1");
        meminfo("MemAvailable").unwrap_or_default()
    };
    let mut last = read();
    for _ in 0..40 {
        thread::sleep(Duration::from_millis(250));
        let now = read();
        if now.abs_diff(last) <= SLACK {
            return now as f64;
        }
        last = now;
    }
    last as f64
}

/// Gives back the free pages that each CPU keeps for itself, 20 MiB in the lab, which do not count as available: with
/// short lists allowed, whatever is freed next shortens them.
fn empty_lists() {
    const LIMIT: &str = "/proc/sys/vm/percpu_pagelist_high_fraction";
    const DEFAULT: &str = "0";
    const SHORT: &str = "100000";
    const CHURN: usize = 32 << 20;
    if fs::write(LIMIT, SHORT).is_ok() {
        drop(black_box(vec![1_u8; CHURN]));
        let _ = fs::write(LIMIT, DEFAULT);
    }
}

/// A look at the host's memory, in KiB.
struct Look {
    available: f64,
    lines: Vec<f64>,
    few: bool,
}

impl Look {
    fn now(few: bool) -> Self {
        let available = settled(few);
        let lines = LINES.iter().map(|(name, _)| meminfo(name).unwrap_or_default() as f64).collect();
        Self { available, lines, few }
    }

    /// Records what each of `count` forks took since this look, as `WHAT` and `WHAT.LINE`.
    fn record(&self, results: &Results, what: &str, count: usize, note: &str) -> anyhow::Result<()> {
        let now = Self::now(self.few);
        let each = |before: f64, after: f64| vec![(after - before) / count as f64];
        results.record(what, "KiB", each(now.available, self.available), Some(note))?;
        let sum = |look: &Self| look.lines.iter().sum::<f64>();
        let parts = each(sum(self), sum(&now));
        results.record(&format!("{what}.accounted"), "KiB", parts, Some("the parts below together"))?;
        for ((_, name), (before, after)) in LINES.iter().zip(self.lines.iter().zip(&now.lines)) {
            results.record(&format!("{what}.{name}"), "KiB", each(*before, *after), None)?;
        }
        Ok(())
    }
}

/// What a fork's process holds alone, in KiB.
struct Private {
    /// Guest memory it has copied.
    guest: f64,
    /// Everything else of the process.
    process: f64,
    /// Page tables.
    tables: f64,
}

impl Private {
    /// Of the process `pid`; none if it is gone.
    fn of(pid: i32) -> Option<Self> {
        let tables = kib_line(&format!("/proc/{pid}/status"), "VmPTE")? as f64;
        let text = fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
        let (mut guest, mut process, mut in_guest) = (0.0, 0.0, false);
        for line in text.lines() {
            let Some((name, rest)) = line.split_once(':').filter(|(name, _)| !name.contains(' ')) else {
                // A mapping's first line: addresses, rights, and the file at its end.
                in_guest = line.contains("/memfd:");
                continue;
            };
            if name == "Private_Dirty" || name == "Private_Clean" {
                let kib: f64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
                *(if in_guest { &mut guest } else { &mut process }) += kib;
            }
        }
        Some(Self { guest, process, tables })
    }
}

/// Records what these processes hold alone.
pub fn record_private(results: &Results, what: &str, pids: &[i32]) -> anyhow::Result<()> {
    let each: Vec<Private> = pids.iter().filter_map(|&pid| Private::of(pid)).collect();
    let part = |part: fn(&Private) -> f64| each.iter().map(part).collect();
    let record =
        |name: &str, values, note| results.record(&format!("{what}.{name}"), "KiB", values, Some(note));
    record("private_guest", part(|each| each.guest), "guest pages copied, smaps")?;
    record("private_process", part(|each| each.process), "all else of the process, smaps")?;
    record("process_tables", part(|each| each.tables), "VmPTE")
}

/// The processes of forks.
fn pids(forks: &[Fork]) -> Vec<i32> {
    forks.iter().map(|fork| fork.pid).collect()
}

/// Memory over the number of forks, null guest.
pub fn null(bench: &mut Bench, results: &Results, quick: bool) -> anyhow::Result<()> {
    if !results.wants(&["mem"]) {
        return Ok(());
    }
    bench.drop_pool()?;
    let steps: &[usize] = match (bench.lab, quick) {
        (true, _) => &[20, 100],
        (false, true) => &[10, 100],
        (false, false) => &[10, 50, 100, 200, 400, 700, 1000],
    };
    let before = Look::now(bench.lab);
    let mut forks = Vec::new();
    for &count in steps {
        forks.extend(bench.fork_many(Source::New, count - forks.len())?);
        before.record(
            results,
            &format!("mem.at_{count}"),
            count,
            "MemAvailable, a fork, each acknowledged",
        )?;
    }
    record_private(results, "mem", &pids(&forks))?;
    bench.destroy_all()
}

/// Memory of idle and of parked forks, Linux guest.
pub fn debian(bench: &mut Bench, results: &Results, quick: bool) -> anyhow::Result<()> {
    if results.wants(&["mem.idle", "mem.at_"]) {
        idle(bench, results, quick)?;
    }
    let count = if quick { 16 } else { 64 };
    for (what, keep_writes) in [("mem.parked", true), ("mem.parked_bare", false)] {
        if results.wants(&[what]) && bench.guest == Guest::Debian {
            parked(bench, results, what, count, keep_writes)?;
        }
    }
    bench.drop_pool()
}

/// Forks that answered and ran a command each.
fn idle(bench: &mut Bench, results: &Results, quick: bool) -> anyhow::Result<()> {
    let steps: &[usize] = if quick { &[20] } else { &[20, 50, 100, 200] };
    bench.drop_pool()?;
    let before = Look::now(bench.lab);
    let mut forks: Vec<Fork> = Vec::new();
    for &count in steps {
        for _ in forks.len()..count {
            let fork = bench.fork(Source::New)?.1;
            bench.exec(&fork, &["/bin/true"])?;
            forks.push(fork);
        }
        let note = format!("MemAvailable, {count} forks that ran /bin/true");
        before.record(results, &format!("mem.at_{count}"), count, &note)?;
    }
    thread::sleep(REST);
    before.record(
        results,
        "mem.idle",
        forks.len(),
        &format!("MemAvailable over {} forks, at rest", forks.len()),
    )?;
    record_private(results, "mem.idle", &pids(&forks))?;
    bench.destroy_all()
}

fn parked(
    bench: &mut Bench,
    results: &Results,
    what: &str,
    count: u64,
    keep_writes: bool,
) -> anyhow::Result<()> {
    if !bench.pools {
        results.skip(what, "no pool in this build");
        return Ok(());
    }
    bench.drop_pool()?;
    let before = Look::now(bench.lab);
    bench.fill_pool(Pool { keep_writes, ..Pool::of(count) })?;
    before.record(results, what, count as usize, &format!("MemAvailable over {count} parked forks"))?;
    record_private(results, what, &bench.parked_pids()?)?;
    bench.drop_pool()
}
