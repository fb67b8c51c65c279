//! Figures of Forkling beside their baselines: over the daemon's socket, as users see them.
//!
//! Rules: every figure says where it was taken; forks count only once their guest acknowledged; teardown is shown;
//! baselines run in the same minutes on the same host, never from a table; p99 needs a thousand samples.
#![forbid(unsafe_code)]

mod baseline;
mod bench;
mod client;
mod compare;
mod daemon;
mod figure;
mod gate;
mod host;
mod page;
mod pool;
mod results;
mod suite;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use bench::{Guest, Places};
use host::Origin;
use results::Results;

/// Figures of Forkling beside their baselines
#[derive(Debug, Parser)]
#[command(name = "forkling-bench")]
struct Args {
    /// Where figures and samples are kept
    #[arg(long, global = true, default_value = "target/bench", value_name = "DIR")]
    out: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Take figures on this host
    Run(Run),
    /// Take the main figures of two builds, request by request in turn
    Compare(compare::Args),
    /// Write an HTML page of the figures
    Page,
    /// Print the figures as a table
    Show,
    /// Take over the figures of another directory
    Merge {
        /// The directory
        from: PathBuf,
    },
    /// Fail when a figure is worse than the baseline allows
    Gate(gate::Args),
    /// A baseline, in a process of its own
    #[command(hide = true)]
    Baseline(baseline::Args),
}

#[derive(Debug, clap::Args)]
struct Run {
    /// What runs in the guests
    #[arg(long, value_enum)]
    guest: Guest,
    /// Only figures whose id begins so
    #[arg(long, num_args = 1.., value_name = "ID")]
    only: Vec<String>,
    /// Few samples: for a look, not for publication
    #[arg(long)]
    quick: bool,
    /// Cold starts and nothing else; they need root, and templates on a disk
    #[arg(long)]
    cold: bool,
    /// Commit, where there is no git
    #[arg(long, env = "FORKLING_BENCH_REV")]
    rev: Option<String>,
    #[command(flatten)]
    places: PlaceArgs,
}

#[derive(Debug, clap::Args)]
struct PlaceArgs {
    /// Directory of forkd, forkling-vmm, forkling-agent [default: that of this program]
    #[arg(long, env = "FORKLING_BIN", value_name = "DIR")]
    programs: Option<PathBuf>,
    /// Directory of the Debian guest's kernel and root
    #[arg(long, env = "FORKLING_GUEST_DIR", default_value = "target/artifacts", value_name = "DIR")]
    artifacts: PathBuf,
    /// Directory of `qemu-system-x86_64`, `lib` and `share` [default: no guest of QEMU as a baseline]
    #[arg(long, value_name = "DIR")]
    qemu: Option<PathBuf>,
    /// Directory for templates; on a disk, for cold starts
    #[arg(long, default_value = "/tmp", value_name = "DIR")]
    scratch: PathBuf,
}

impl PlaceArgs {
    fn places(&self) -> anyhow::Result<Places> {
        let own = || Ok(std::env::current_exe()?.parent().map(PathBuf::from).unwrap_or_default());
        Ok(Places {
            programs: std::path::absolute(self.programs.clone().map_or_else(own, anyhow::Ok)?)?,
            artifacts: std::path::absolute(&self.artifacts)?,
            qemu: self.qemu.as_ref().map(std::path::absolute).transpose()?,
            scratch: std::path::absolute(&self.scratch)?,
        })
    }
}

fn main() -> anyhow::Result<std::process::ExitCode> {
    let Args { out, command } = Args::parse();
    match command {
        Command::Run(run) => {
            let results = Results::new(Origin::here(run.rev), run.guest.name(), &out, run.only)?;
            let places = run.places.places()?;
            match run.cold {
                true => suite::run_cold(&places, run.guest, &results, run.quick)?,
                false => suite::run(&places, run.guest, &results, run.quick)?,
            }
        }
        Command::Compare(args) => compare::run(&args)?,
        Command::Page => page::write(&out)?,
        Command::Show => {
            results::show_head();
            results::figures(&out)?.values().for_each(results::show);
        }
        Command::Merge { from } => results::merge_directory(&from, &out)?,
        Command::Gate(args) => return gate::run(&args, &out),
        Command::Baseline(args) => baseline::worker(&args)?,
    }
    Ok(std::process::ExitCode::SUCCESS)
}
