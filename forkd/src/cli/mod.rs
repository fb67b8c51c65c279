//! The `forkling` command: a client of the API, nothing more.

mod client;
mod doctor;
mod exec;
mod fork;
mod network;
mod output;
mod pool;
mod port_forward;
mod progress;
mod template;

use std::{path::PathBuf, process::ExitCode};

use clap::{CommandFactory, Parser, Subcommand};

use client::{Client, Failure};
use output::Output;

/// Exit status when the command itself could not do its work, as far from a guest command's own as shells keep it.
const FAILED: u8 = 125;

/// Exit status when a guest command does not exist.
const NOT_FOUND: u8 = 127;

#[derive(Debug, Parser)]
#[command(
    name = "forkling",
    version,
    about = "Forks of template VMs: build a template once, fork it many times"
)]
struct Args {
    /// Socket of the daemon [default: /run/forkling/forkd.sock for root, else $XDG_RUNTIME_DIR/forkling/forkd.sock]
    #[arg(long, global = true, env = crate::config::SOCKET_ENV, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Print JSON instead of text
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Check whether this host can run forks, and say what to do where it cannot
    Doctor,
    /// Build, list and remove templates
    #[command(subcommand)]
    Template(template::Command),
    /// Show or set how many forks of a template wait to be taken
    Pool(pool::Pool),
    /// Make forks of a template
    Fork(fork::Create),
    /// Run a command in a fork
    Exec(exec::Exec),
    /// Make a fork, run a command in it, kill it
    Run(exec::Run),
    /// List forks
    Ps(fork::Ps),
    /// Kill forks
    Kill(fork::Kill),
    /// Show a fork, with the end of its console
    Inspect(fork::Inspect),
    /// Make a template of a running fork
    Snapshot(fork::Snapshot),
    /// Show or change what a fork may reach on the network
    Network(network::Network),
    /// Take a running fork back to where its template was frozen, in place
    Reset(fork::Reset),
    /// Forward ports of this host's loopback to ports of a fork, until interrupted
    PortForward(port_forward::PortForward),
    /// Join standard input and output with a port of a fork
    Tunnel(port_forward::Tunnel),
    /// Open a fork's vsock as a Unix socket that takes "CONNECT PORT", and print its path
    Vsock(port_forward::Vsock),
    /// Print the completions of a shell
    Completions {
        /// For which shell
        shell: clap_complete::Shell,
    },
    /// Print the version of this program and of the daemon
    Version,
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let output = Output { json: args.json };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return output.fail(&Failure::Local(format!("cannot start: {error}"))),
    };
    let outcome = runtime.block_on(run(args, output));
    // A read of standard input that never ends must not keep the process.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => code,
        Err(failure) => output.fail(&failure),
    }
}

async fn run(args: Args, output: Output) -> Result<ExitCode, Failure> {
    let socket = || args.socket.clone().map_or_else(crate::config::default_socket, Ok);
    let client = || socket().map(Client::new).map_err(|error| Failure::Local(error.to_string()));
    match args.command {
        Command::Doctor => Ok(doctor::run(client().ok(), output).await),
        Command::Template(command) => template::run(command, &client()?, output).await,
        Command::Pool(pool) => pool.run(&client()?, output).await,
        Command::Fork(create) => create.run(&client()?, output).await,
        Command::Exec(exec) => exec.run(&client()?, output).await,
        Command::Run(run) => run.run(&client()?, output).await,
        Command::Ps(ps) => ps.run(&client()?, output).await,
        Command::Kill(kill) => kill.run(&client()?, output).await,
        Command::Inspect(inspect) => inspect.run(&client()?, output).await,
        Command::Network(network) => network.run(&client()?, output).await,
        Command::Reset(reset) => reset.run(&client()?, output).await,
        Command::Snapshot(snapshot) => snapshot.run(&client()?, output).await,
        Command::PortForward(forward) => forward.run(&client()?, output).await,
        Command::Tunnel(tunnel) => tunnel.run(&client()?, output).await,
        Command::Vsock(vsock) => vsock.run(&client()?, output).await,
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Args::command(), "forkling", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Command::Version => version(&client()?, output).await,
    }
}

async fn version(client: &Client, output: Output) -> Result<ExitCode, Failure> {
    let own = env!("CARGO_PKG_VERSION");
    // Without a daemon the program's own version is still an answer.
    let daemon = client.get::<crate::api::types::Version>("/v1/version").await.ok();
    if output.json {
        output.print(&serde_json::json!({ "version": own, "daemon": daemon }));
    } else {
        println!("forkling {own}");
        match daemon {
            Some(daemon) => println!("forkd {} (API {}, process {})", daemon.version, daemon.api, daemon.pid),
            None => println!("forkd is not running"),
        }
    }
    Ok(ExitCode::SUCCESS)
}
