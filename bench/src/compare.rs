//! Two builds side by side: the same requests in turn, so that a busy minute hits both.

use std::path::PathBuf;

use anyhow::Context as _;

use crate::{
    PlaceArgs,
    bench::{Bench, Guest, Source},
    figure::Spread,
    host::Origin,
    pool::Pool,
    suite::ladder::{Step, climb},
};

/// Requests of an arm before it is the other's turn.
const TURN: usize = 10;

/// Parked forks of each.
const DEPTH: u64 = 8;

/// Arguments of `compare`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory of one build's programs
    a: PathBuf,
    /// Directory of the other's
    b: PathBuf,
    /// What runs in the guests
    #[arg(long, value_enum, default_value_t = Guest::Null)]
    guest: Guest,
    /// Requests of each build for each figure
    #[arg(long, default_value_t = 1000)]
    count: usize,
    #[command(flatten)]
    places: PlaceArgs,
}

/// Takes the figures of both and prints them with their ratio.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let lab = Origin::here(None).is_lab();
    let start = |programs: &PathBuf| {
        let mut places = args.places.places()?;
        places.programs = std::path::absolute(programs)?;
        let bench = Bench::start(&places, args.guest, lab);
        bench.with_context(|| format!("build {}", programs.display()))
    };
    let mut benches = [start(&args.a)?, start(&args.b)?];
    println!("A {}\nB {}", args.a.display(), args.b.display());
    println!(
        "{:24} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "", "A p50", "A p99", "B p50", "B p99", "p50 B/A", "p99 B/A"
    );
    let steps: &[Step] = match args.guest {
        Guest::Null => &[Step::Ack],
        Guest::Debian => &[Step::Ack, Step::Rpc, Step::ExecTrue],
    };
    for source in [Source::New, Source::Pool] {
        if source == Source::Pool && !benches.iter().all(|bench| bench.pools) {
            println!("pool_hit: not both builds have a pool");
            continue;
        }
        for bench in benches.iter_mut().filter(|bench| bench.pools) {
            bench.fill_pool(Pool::of(if source == Source::Pool { DEPTH } else { 0 }))?;
        }
        for &step in steps {
            let times = in_turn(&mut benches, source, step, args.count)?;
            let name = if source == Source::Pool { "pool_hit" } else { "pool_miss" };
            print(&format!("{name}.{}", step.name()), times);
        }
    }
    for bench in benches {
        bench.daemon.end()?;
    }
    Ok(())
}

fn in_turn(
    benches: &mut [Bench; 2],
    source: Source,
    step: Step,
    count: usize,
) -> anyhow::Result<[Vec<f64>; 2]> {
    let mut times = [Vec::new(), Vec::new()];
    while times[0].len() < count {
        let turn = TURN.min(count - times[0].len());
        for (bench, times) in benches.iter_mut().zip(&mut times) {
            for _ in 0..turn {
                let (took, fork) = climb(bench, source, step)?;
                times.push(took);
                bench.destroy(&fork)?;
                if source == Source::Pool {
                    bench.wait_parked(DEPTH)?;
                }
            }
        }
    }
    Ok(times)
}

fn print(what: &str, [mut a, mut b]: [Vec<f64>; 2]) {
    let (Some(a), Some(b)) = (Spread::of(&mut a), Spread::of(&mut b)) else { return };
    println!(
        "{what:24} {:9.3} {:9.3} {:9.3} {:9.3} {:9.3} {:9.3}",
        a.p50,
        a.p99,
        b.p50,
        b.p99,
        b.p50 / a.p50,
        b.p99 / a.p99
    );
}
