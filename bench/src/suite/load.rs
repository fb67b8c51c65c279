//! Many forks: in one request, from many callers at once, and for a long time.

use std::{
    collections::BTreeSet,
    sync::{Barrier, Mutex},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, ensure};

use crate::{
    bench::{Bench, Source, forks},
    client::{Connection, request},
    daemon::wait_gone,
    host,
    pool::Pool,
    results::Results,
};

/// Forks of a fan-out.
const FAN_OUT: usize = 1000;

/// Parked forks while many are taken.
const DEPTH: u64 = 64;

/// Callers of the sustained load.
const CALLERS: usize = 4;

/// Stack of a caller's thread in bytes.
const STACK: usize = 256 << 10;

/// 1,000 forks in one request, without a pool and with one that holds as many.
pub fn fan_out(bench: &mut Bench, results: &Results, quick: bool) -> anyhow::Result<()> {
    if bench.lab {
        return Ok(());
    }
    let rounds = if quick { 2 } else { 5 };
    bench.drop_pool()?;
    if results.wants(&["fanout_1000.wall"]) {
        one_request(bench, results, "fanout_1000", rounds, 0)?;
    }
    if bench.pools && results.wants(&["fanout_1000.pooled"]) {
        one_request(bench, results, "fanout_1000.pooled", rounds, FAN_OUT as u64)?;
        bench.drop_pool()?;
    }
    Ok(())
}

/// Each fork counts when its guest acknowledged with the nonce it was given; the daemon compares.
fn one_request(
    bench: &mut Bench,
    results: &Results,
    what: &str,
    rounds: usize,
    parked: u64,
) -> anyhow::Result<()> {
    let ask = request("POST", "/v1/forks", Some(&bench.fork_body(Source::Pool, FAN_OUT)));
    let (mut walls, mut failures, mut teardowns) = (Vec::new(), Vec::new(), Vec::new());
    let mut load: f64 = 0.0;
    for _ in 0..rounds {
        if parked > 0 {
            bench.fill_pool(Pool::of(parked))?;
        }
        load = load.max(host::load());
        let (took, reply) = bench.connection.timed(&ask)?;
        if parked > 0 {
            bench.set_pool(Pool::none())?;
        }
        let made: Vec<_> = forks(&reply)?.into_iter().flatten().collect();
        let generations: BTreeSet<u64> = made.iter().map(|fork| fork.generation).collect();
        ensure!(generations.len() == made.len(), "two forks of one request have the same generation");
        walls.push(took.as_secs_f64() * 1e3);
        failures.push((FAN_OUT - made.len()) as f64);
        let began = Instant::now();
        bench.destroy_all()?;
        teardowns.push(began.elapsed().as_secs_f64() * 1e3);
        bench.settle()?;
    }
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let order = walls.iter().map(|wall| format!("{wall:.0}")).collect::<Vec<_>>().join(" ");
    let note = format!("{cores} cores, load before up to {load:.1}, {parked} were parked; in order {order}");
    results.record(&format!("{what}.wall"), "ms", walls, Some(&note))?;
    results.record(&format!("{what}.failures"), "1", failures, Some("of 1,000"))?;
    results.record(&format!("{what}.destroy"), "ms", teardowns, Some("until all 1,000 processes are gone"))
}

/// So many callers with one request each at the same time, several times over.
pub fn at_once(bench: &mut Bench, results: &Results, quick: bool) -> anyhow::Result<()> {
    for callers in [1, 16, 100, 1000] {
        let what = format!("at_once_{callers}");
        if !results.wants(&[&what]) || bench.lab {
            continue;
        }
        let requests = if quick { 200 } else { 2000 };
        let rounds = requests_per_caller(requests, callers);
        let (times, failed) = storm(bench, callers, rounds)?;
        let note = format!(
            "{rounds} rounds, {failed} failed, pool {}",
            if bench.pools { "64 deep" } else { "none" }
        );
        results.record(&format!("{what}.ack"), "ms", times, Some(&note))?;
    }
    bench.drop_pool()
}

fn requests_per_caller(requests: usize, callers: usize) -> usize {
    (requests / callers).max(2)
}

/// Milliseconds of each request, and how many failed.
fn storm(bench: &mut Bench, callers: usize, rounds: usize) -> anyhow::Result<(Vec<f64>, usize)> {
    let ask = request("POST", "/v1/forks", Some(&bench.fork_body(Source::Pool, 1)));
    let mut connections =
        (0..callers).map(|_| bench.connection.another()).collect::<anyhow::Result<Vec<_>>>()?;
    let (mut times, mut failed) = (Vec::new(), 0);
    for _ in 0..rounds {
        if bench.pools {
            bench.fill_pool(Pool::of(DEPTH))?;
        }
        let barrier = Barrier::new(callers);
        let outcomes = Mutex::new(Vec::new());
        thread::scope(|scope| -> anyhow::Result<()> {
            for connection in &mut connections {
                let (ask, barrier, outcomes) = (&ask, &barrier, &outcomes);
                let caller = move || {
                    barrier.wait();
                    let outcome = connection.timed(ask);
                    outcomes.lock().expect("no caller panics").push(outcome);
                };
                thread::Builder::new().stack_size(STACK).spawn_scoped(scope, caller)?;
            }
            Ok(())
        })?;
        for outcome in outcomes.into_inner().expect("no caller panics") {
            let (took, reply) = outcome?;
            match forks(&reply) {
                Ok(made) if made.iter().all(Result::is_ok) => times.push(took.as_secs_f64() * 1e3),
                _ => failed += 1,
            }
        }
        bench.destroy_all()?;
    }
    Ok((times, failed))
}

/// What one caller of the sustained load did.
#[derive(Debug, Default)]
struct Shift {
    /// Seconds from the start to the end of each cycle.
    ends: Vec<f64>,
    /// Milliseconds to each acknowledgement.
    acks: Vec<f64>,
    /// Cycles whose fork was parked.
    parked: usize,
}

/// Fork, acknowledgement, destruction, over and over, far past the pool's depth.
pub fn cycles(bench: &mut Bench, results: &Results, quick: bool) -> anyhow::Result<()> {
    if !results.wants(&["cycles"]) || bench.lab {
        return Ok(());
    }
    if bench.pools {
        bench.fill_pool(Pool::of(DEPTH))?;
    }
    let idle = bench.daemon.children().len();
    let length = Duration::from_secs(if quick { 5 } else { 20 });
    let ask = request("POST", "/v1/forks", Some(&bench.fork_body(Source::Pool, 1)));
    let mut connections =
        (0..CALLERS).map(|_| bench.connection.another()).collect::<anyhow::Result<Vec<_>>>()?;
    let began = Instant::now();
    let shifts = thread::scope(|scope| {
        let callers: Vec<_> = connections
            .iter_mut()
            .map(|connection| scope.spawn(|| shift(connection, &ask, began, length)))
            .collect();
        let joined =
            callers.into_iter().map(|caller| caller.join().map_err(|_| anyhow!("a caller panicked"))?);
        joined.collect::<anyhow::Result<Vec<Shift>>>()
    })?;
    // What was destroyed has to be gone, or it was only put off.
    while bench.daemon.children().len() > idle {
        ensure!(began.elapsed() < 4 * length, "destroyed forks do not go away");
        thread::sleep(Duration::from_millis(1));
    }
    let all = began.elapsed().as_secs_f64();
    record_cycles(results, &shifts, length, all)?;
    bench.drop_pool()
}

fn record_cycles(results: &Results, shifts: &[Shift], length: Duration, all: f64) -> anyhow::Result<()> {
    let mut windows = vec![0.0; length.as_secs() as usize];
    for &end in shifts.iter().flat_map(|shift| &shift.ends) {
        if let Some(window) = windows.get_mut(end as usize) {
            *window += 1.0;
        }
    }
    let count: usize = shifts.iter().map(|shift| shift.ends.len()).sum();
    let parked: usize = shifts.iter().map(|shift| shift.parked).sum();
    let share = 100.0 * parked as f64 / count.max(1) as f64;
    let note =
        format!("seconds' rates, {CALLERS} callers, {count} cycles, {share:.0} % from the pool of {DEPTH}");
    results.record("cycles_per_s", "1/s", windows, Some(&note))?;
    let note = format!("until every process was gone, {all:.1} s");
    results.record("cycles_per_s.drained", "1/s", vec![count as f64 / all], Some(&note))?;
    let acks = shifts.iter().flat_map(|shift| shift.acks.iter().copied()).collect();
    results.record("cycles.ack", "ms", acks, Some("under that load"))
}

fn shift(connection: &mut Connection, ask: &[u8], began: Instant, length: Duration) -> anyhow::Result<Shift> {
    let mut shift = Shift::default();
    while began.elapsed() < length {
        let (took, reply) = connection.timed(ask)?;
        let fork = forks(&reply)?.pop().context("no fork in the answer")??;
        connection.call("DELETE", &format!("/v1/forks/{}", fork.id), None)?;
        shift.acks.push(took.as_secs_f64() * 1e3);
        shift.ends.push(began.elapsed().as_secs_f64());
        shift.parked += usize::from(fork.parked);
    }
    Ok(shift)
}

/// Killing one fork: the answer, and the end of its process.
pub fn destroy(bench: &mut Bench, results: &Results, quick: bool) -> anyhow::Result<()> {
    if !results.wants(&["destroy"]) {
        return Ok(());
    }
    let count = match (bench.lab, quick) {
        (true, _) => 20,
        (false, true) => 100,
        (false, false) => 1000,
    };
    let (mut answered, mut gone) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for _ in 0..count {
        let fork = bench.fork(Source::New)?.1;
        let kill = request("DELETE", &format!("/v1/forks/{}", fork.id), None);
        let began = Instant::now();
        let (took, reply) = bench.connection.timed(&kill)?;
        ensure!(reply.is_success(), "cannot kill: {}", reply.text());
        ensure!(wait_gone(fork.pid, Duration::from_secs(60))?, "fork {} does not end", fork.id);
        answered.push(took.as_secs_f64() * 1e3);
        gone.push(began.elapsed().as_secs_f64() * 1e3);
    }
    results.record("destroy.answered", "ms", answered, None)?;
    results.record("destroy.gone", "ms", gone, Some("the process has ended"))
}
