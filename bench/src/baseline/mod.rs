//! Baselines: other ways to a guest that runs, on the same host in the same minutes, with the null guest.
//!
//! Each is one process that makes one VM after the other and ends, as the published benchmarks do; what it leaves
//! mapped is gone with it, so a process makes few of them and there are many processes.

mod machine;

use std::process::Command;

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};

use machine::{Memory, Template};

/// VMs made before the first that counts.
const WARM_UP: usize = 3;

/// Which baseline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// (a) The sequence zeroboot publishes: VM, interrupt chips, timer, private mapping of a memfd, memslot, vCPU and
    /// its state. Its clock stops there; ours goes on to the first `out`.
    Zeroboot,
    /// (b) The same, with the memory copied instead of mapped.
    Eager,
    /// (c) The same, with a private mapping of a file on a disk.
    File,
    /// (d) A cold boot: the program loaded into empty memory and run to its forkpoint.
    Boot,
}

impl Kind {
    /// Name on the command line and letter in figure ids.
    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Zeroboot => ("zeroboot", "baseline_a"),
            Self::Eager => ("eager", "baseline_b"),
            Self::File => ("file", "baseline_c"),
            Self::Boot => ("boot", "baseline_d"),
        }
    }

    /// `baseline_a` for instance.
    pub fn id(self) -> &'static str {
        self.names().1
    }

    /// VMs a process makes: those of (b) take all of their memory, and keep it to the process's end.
    fn per_process(self) -> usize {
        match self {
            Self::Eager => 4,
            _ => 50,
        }
    }
}

/// The hidden subcommand's arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[arg(value_enum)]
    kind: Kind,
    count: usize,
}

/// Milliseconds from the first call.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Times {
    /// To the last call before KVM_RUN.
    pub prepared: Vec<f64>,
    /// To the guest's first `out`.
    pub first_out: Vec<f64>,
}

/// Runs `count` VMs of a baseline in processes of their own.
pub fn collect(kind: Kind, count: usize) -> anyhow::Result<Times> {
    let mut all = Times::default();
    while all.first_out.len() < count {
        let piece = kind.per_process().min(count - all.first_out.len());
        let program = std::env::current_exe()?;
        let output = Command::new(program)
            .args(["baseline", kind.names().0, &piece.to_string()])
            .stderr(std::process::Stdio::inherit())
            .output()
            .context("cannot start this program again")?;
        ensure!(output.status.success(), "baseline {kind:?} failed: {}", output.status);
        let times: Times = serde_json::from_slice(&output.stdout).context("a baseline's answer")?;
        all.prepared.extend(times.prepared);
        all.first_out.extend(times.first_out);
    }
    Ok(all)
}

/// The process of a baseline: prints its [`Times`].
pub fn worker(args: &Args) -> anyhow::Result<()> {
    let memory = match args.kind {
        Kind::File => Memory::File,
        _ => Memory::Memfd,
    };
    let template = Template::new(memory)?;
    let mut times = Times::default();
    for round in 0..WARM_UP.min(args.count) + args.count {
        let (prepared, first_out) = match args.kind {
            Kind::Zeroboot | Kind::File => template.map_and_run()?,
            Kind::Eager => template.copy_and_run()?,
            Kind::Boot => machine::boot_and_run()?,
        };
        if round >= WARM_UP.min(args.count) {
            times.prepared.push(prepared);
            times.first_out.push(first_out);
        }
    }
    println!("{}", serde_json::to_string(&times)?);
    Ok(())
}
