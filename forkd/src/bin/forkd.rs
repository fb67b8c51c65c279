//! The `forkd` program.

use clap::Parser;
use forkling_daemon::{config::Args, daemon};
use tracing_subscriber::EnvFilter;

fn main() -> anyhow::Result<()> {
    let filter = EnvFilter::try_from_env("FORKLING_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    daemon::run(Args::parse())
}
