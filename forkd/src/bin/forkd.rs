//! The `forkd` program.

use std::{io::IsTerminal, process::ExitCode};

use clap::Parser;
use forkling_daemon::{config::Args, daemon};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    forkling_vmm::abort_on_panic();
    let filter = EnvFilter::try_from_env("FORKLING_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let outcome = if std::env::args_os().nth(1).is_some_and(|role| role == "net") {
        daemon::run_net()
    } else {
        daemon::run(Args::parse())
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // In one line, without the backtrace that anyhow would add.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
