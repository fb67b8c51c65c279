//! The ladder of a fork: acknowledged, first RPC reply, first process, Python; from the pool and not, beside the baselines.

use std::time::Instant;

use anyhow::{Context as _, ensure};
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;

use super::Phases;
use crate::{
    baseline::{self, Kind, Times},
    bench::{Bench, Fork, Source, forks},
    client::{Reply, request},
    pool::Pool,
    results::Results,
};

/// Parked forks while single ones are taken.
const DEPTH: u64 = 8;

/// Rounds in which the arms take turns, so that a busy minute hits all of them.
const ROUNDS: usize = 10;

/// Parts of the ladder by their last step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The guest acknowledged its identity.
    Ack,
    /// The agent answered a request.
    Rpc,
    /// `/bin/true` ended.
    ExecTrue,
    /// Python printed a sum.
    Python,
}

impl Step {
    /// As in figure ids.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ack => "ack",
            Self::Rpc => "rpc",
            Self::ExecTrue => "exec_true",
            Self::Python => "python",
        }
    }
}

fn source_id(source: Source) -> &'static str {
    match source {
        Source::Pool => "pool_hit",
        Source::New => "pool_miss",
    }
}

/// What the client itself costs: the daemon's cheapest answer, and its own CPU time for a request.
pub fn client(bench: &mut Bench, results: &Results, quick: bool) -> anyhow::Result<()> {
    if !results.wants(&["client"]) {
        return Ok(());
    }
    let count = if quick { 200 } else { 2000 };
    let ask = request("GET", "/v1/version", None);
    let (mut rtt, mut cpu) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for _ in 0..count {
        let before = thread_cpu_ms();
        rtt.push(bench.connection.timed(&ask)?.0.as_secs_f64() * 1e3);
        cpu.push(thread_cpu_ms() - before);
    }
    results.record("client.rtt", "ms", rtt, Some("GET /v1/version on the kept connection"))?;
    results.record("client.cpu", "ms", cpu, Some("of that, CPU time of the client"))
}

fn thread_cpu_ms() -> f64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec as f64 * 1e3 + now.tv_nsec as f64 / 1e6
}

/// Request to acknowledgement, with the baselines in the same rounds.
pub fn null(bench: &mut Bench, results: &Results, quick: bool) -> anyhow::Result<()> {
    if !results.wants(&["pool_hit", "pool_miss", "baseline"]) {
        return Ok(());
    }
    // In lab time samples hardly differ.
    let count = match (bench.lab, quick) {
        (true, _) => 20,
        (false, true) => 200,
        (false, false) => 2000,
    } / ROUNDS;
    let mut hits = Arm::new(Source::Pool, Step::Ack);
    let mut misses = Arm::new(Source::New, Step::Ack);
    let kinds = [Kind::Zeroboot, Kind::Eager, Kind::File, Kind::Boot];
    let mut baselines: Vec<(Kind, Times)> = kinds.map(|kind| (kind, Times::default())).to_vec();
    for _ in 0..ROUNDS {
        misses.run(bench, results, count)?;
        for (kind, times) in baselines.iter_mut().filter(|(kind, _)| results.wants(&[kind.id()])) {
            // A copy of all memory takes a hundred times as long.
            let count = if *kind == Kind::Eager { count.div_ceil(50) } else { count };
            let more = baseline::collect(*kind, count)?;
            times.prepared.extend(more.prepared);
            times.first_out.extend(more.first_out);
        }
        hits.run(bench, results, count)?;
    }
    bench.drop_pool()?;
    hits.record(bench, results)?;
    misses.record(bench, results)?;
    for (kind, times) in baselines {
        if !times.first_out.is_empty() {
            results.record(
                &format!("{}.prepared", kind.id()),
                "ms",
                times.prepared,
                Some("before KVM_RUN"),
            )?;
            results.record(&format!("{}.first_out", kind.id()), "ms", times.first_out, None)?;
        }
    }
    ratios(results)
}

/// How many times longer baseline (a) takes to its first `out` than a fork to its checked acknowledgement.
fn ratios(results: &Results) -> anyhow::Result<()> {
    let figures = results.taken()?;
    let p50 = |what: &str| figures.get(&results.id(what)).map(|figure| figure.p50);
    let Some(baseline) = p50("baseline_a.first_out") else { return Ok(()) };
    for source in [Source::Pool, Source::New] {
        let name = source_id(source);
        if let Some(fork) = p50(&format!("{name}.ack")) {
            let what = format!("baseline_a.first_out.times_{name}");
            results.record(&what, "x", vec![baseline / fork], Some("ratio of the medians"))?;
        }
    }
    Ok(())
}

/// The whole ladder of a Linux guest.
pub fn debian(bench: &mut Bench, results: &Results, quick: bool) -> anyhow::Result<()> {
    if !results.wants(&["pool_hit", "pool_miss"]) {
        return Ok(());
    }
    let few = if quick { 3 } else { 10 };
    let many = if quick { 10 } else { 40 };
    let plan = [(Step::Ack, many), (Step::Rpc, many), (Step::ExecTrue, many), (Step::Python, few)];
    for source in [Source::New, Source::Pool] {
        for (step, count) in plan {
            let mut arm = Arm::new(source, step);
            arm.run(bench, results, count)?;
            arm.record(bench, results)?;
        }
    }
    if bench.lab {
        let mut arm = Arm { refilling: true, ..Arm::new(Source::Pool, Step::ExecTrue) };
        arm.run(bench, results, many)?;
        arm.record(bench, results)?;
    }
    bench.drop_pool()
}

/// Forks made one after the other, each up to a step of the ladder.
pub struct Arm {
    source: Source,
    step: Step,
    times: Vec<f64>,
    phases: Phases,
    /// Requests that the pool should have served and did not.
    missed: usize,
    /// Forks that were made of an embryo.
    embryos: usize,
    /// Whether the next fork is parked while this one works.
    refilling: bool,
}

impl Arm {
    fn new(source: Source, step: Step) -> Self {
        Self {
            source,
            step,
            times: Vec::new(),
            phases: Phases::default(),
            missed: 0,
            embryos: 0,
            refilling: false,
        }
    }

    fn id(&self) -> String {
        let refilling = if self.refilling { ".refilling" } else { "" };
        format!("{}.{}{refilling}", source_id(self.source), self.step.name())
    }

    fn run(&mut self, bench: &mut Bench, results: &Results, count: usize) -> anyhow::Result<()> {
        if !results.wants(&[&self.id()]) || (self.source == Source::Pool && !bench.pools) {
            return Ok(());
        }
        // On one emulated CPU a refill runs in the middle of what is measured.
        let hold = bench.lab && !self.refilling && self.source == Source::Pool;
        if bench.pools && !hold {
            let depth = if self.source == Source::Pool { DEPTH } else { 0 };
            bench.fill_pool(Pool::of(depth))?;
        }
        let (goal, attempts) = (self.times.len() + count, 2 * count);
        for _ in 0..attempts {
            if self.times.len() == goal {
                break;
            }
            if hold {
                bench.hold_one(Pool::of(1))?;
            }
            let (took, fork) = climb(bench, self.source, self.step)?;
            if fork.parked == (self.source == Source::Pool) {
                self.times.push(took);
                self.phases.push(&fork);
                self.embryos += usize::from(self.source == Source::New && fork.had_process());
            } else {
                self.missed += 1;
            }
            bench.destroy(&fork)?;
            if self.source == Source::Pool && !hold {
                bench.wait_parked(DEPTH)?;
                bench.quiet();
            }
        }
        // A pool trims itself once in a second, and may do so just when one fork is held.
        ensure!(
            self.times.len() == goal,
            "{}: {} requests were served from elsewhere",
            self.id(),
            self.missed
        );
        Ok(())
    }

    fn record(self, bench: &Bench, results: &Results) -> anyhow::Result<()> {
        let id = self.id();
        if !results.wants(&[&id]) {
            return Ok(());
        }
        if self.source == Source::Pool && !bench.pools {
            results.skip(&id, "no pool in this build");
            return Ok(());
        }
        let note = match (self.step, bench.lab && self.source == Source::Pool, self.refilling) {
            (Step::Rpc, ..) if !bench.pings => Some("a refused command: no ping in this build"),
            // It lasts longer than the pool pauses.
            (Step::Python, true, _) => Some("a refill on the same CPU meanwhile"),
            (_, true, false) => Some("no refill meanwhile"),
            (_, true, true) => Some("a refill on the same CPU meanwhile"),
            _ => None,
        };
        let of_embryos = format!("{} of {} made of an embryo", self.embryos, self.times.len());
        let note = note.or((self.source == Source::New).then_some(&*of_embryos));
        results.record(&id, "ms", self.times, note)?;
        if self.step == Step::Ack { self.phases.record(results, source_id(self.source)) } else { Ok(()) }
    }
}

/// Milliseconds from the request for a fork to the end of `step`.
pub fn climb(bench: &mut Bench, source: Source, step: Step) -> anyhow::Result<(f64, Fork)> {
    let ask = request("POST", "/v1/forks", Some(&bench.fork_body(source, 1)));
    let began = Instant::now();
    let made = bench.connection.exchange(&ask)?;
    let answer = match step {
        Step::Ack => None,
        Step::Rpc => Some(rpc(bench, id_in(&made)?)?),
        Step::ExecTrue => Some(command(bench, id_in(&made)?, &["/bin/true"])?),
        Step::Python => Some(command(bench, id_in(&made)?, &PYTHON)?),
    };
    let took = began.elapsed().as_secs_f64() * 1e3;
    // What is read of the answers is read off the clock.
    let fork = forks(&made)?.pop().context("no fork in the answer")??;
    if let Some(reply) = answer {
        check(bench, step, &reply)?;
    }
    Ok((took, fork))
}

/// What the ladder's last step runs.
const PYTHON: [&str; 3] = ["python3", "-c", "print(1+1)"];

/// The id of the only fork of an answer, found without decoding it.
fn id_in(reply: &Reply) -> anyhow::Result<&str> {
    let text = std::str::from_utf8(&reply.body)?;
    let id = text.split_once("\"id\":\"").and_then(|(_, rest)| Some(rest.split_once('"')?.0));
    id.with_context(|| format!("no fork: {}", reply.text()))
}

/// The cheapest request that the fork's agent answers.
fn rpc(bench: &mut Bench, id: &str) -> anyhow::Result<Reply> {
    if bench.pings {
        return bench.connection.exchange(&request("POST", &format!("/v1/forks/{id}/ping"), None));
    }
    // The agent looks for the program, finds none and says so.
    command(bench, id, &["/none"])
}

fn command(bench: &mut Bench, id: &str, argv: &[&str]) -> anyhow::Result<Reply> {
    let body = json!({"argv": argv});
    bench.connection.exchange(&request("POST", &format!("/v1/forks/{id}/exec"), Some(&body)))
}

/// Whether `step` did what it is called after.
fn check(bench: &Bench, step: Step, reply: &Reply) -> anyhow::Result<()> {
    let answer = reply.json()?;
    let done = |output: &str| answer["exit_code"] == 0 && answer["stdout"] == output;
    let right = match step {
        Step::Ack => true,
        Step::Rpc if bench.pings => reply.is_success(),
        Step::Rpc => answer["error"]["code"] == "command_not_found",
        Step::ExecTrue => done(""),
        Step::Python => done("2\n"),
    };
    ensure!(right, "{step:?}: {}", reply.text());
    Ok(())
}
