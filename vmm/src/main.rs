//! `forkling-vmm`: the process image of template builds, zygotes and forks.
//!
//! Started by `forkd` with its control socket as standard input; not meant to be run by hand.

use std::{os::fd::AsFd, process::ExitCode};

use anyhow::{Context as _, bail};
use forkling_vmm::{builder, channel::Channel, zygote};

fn main() -> anyhow::Result<ExitCode> {
    forkling_vmm::abort_on_panic();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_env("FORKLING_LOG"))
        .with_writer(std::io::stderr)
        .init();
    std::env::set_current_dir("/").context("cannot change the working directory to /")?;
    let control = std::io::stdin().as_fd().try_clone_to_owned().context("cannot use standard input")?;
    let control = Channel::new(control);
    let null = std::fs::File::open("/dev/null").context("cannot open /dev/null")?;
    rustix::stdio::dup2_stdin(&null).context("cannot replace standard input")?;
    let role = std::env::args().nth(1);
    match role.as_deref() {
        Some("build") => Ok(if builder::serve(control) { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
        Some("zygote") => zygote::serve(control).map(|()| ExitCode::SUCCESS).context("zygote"),
        _ => bail!(
            "usage: forkling-vmm build|zygote, started by forkd with its control socket as standard input"
        ),
    }
}
