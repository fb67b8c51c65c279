//! PID 1 of a Forkling guest: brings it up, stops it at a forkpoint, gives each fork its identity, runs commands.
//!
//! One thread and no asynchronous runtime: at a forkpoint the agent is at one known instruction, and what it does from
//! there to its acknowledgement is a dozen system calls on descriptors opened before.
#![deny(unsafe_code)]

mod boot;
mod command;
mod console;
mod failure;
mod forkpoint;
mod identity;
mod netlink;
mod network;
mod quiet;
mod ready;
mod reap;
mod run;
mod serve;
#[allow(unsafe_code)]
mod sys;
mod users;
mod waiters;

use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use anyhow::{Context, bail};
use forkling_proto::{forward, rpc};

use crate::failure::give_up;
use crate::forkpoint::Forkpoint;
use crate::reap::Reaper;
use crate::serve::{Listeners, Server};
use crate::waiters::Waiters;

fn main() -> anyhow::Result<()> {
    if std::process::id() != 1 {
        return serve_unix(std::env::args().skip(1).collect::<Vec<_>>().as_slice())
            .map(|never| match never {});
    }
    boot::settle();
    std::panic::set_hook(Box::new(|panic| give_up(&format!("the agent has a bug: {panic}"))));
    match be_init() {
        Ok(never) => match never {},
        Err(error) => give_up(&format!("{error:#}")),
    }
}

/// The life of PID 1.
fn be_init() -> anyhow::Result<Infallible> {
    let config = boot::run()?;
    let template = command::base_environment(&config.env);
    let mut reaper = Reaper::new().context("cannot watch for processes that end")?;
    let listen = |port| {
        sys::socket::listen_vsock(port)
            .context("cannot listen on vsock; does the VMM offer virtio-vsock, and is its module loaded?")
    };
    let listeners = Listeners { rpc: listen(rpc::PORT)?, forward: listen(forward::PORT)? };
    // Before any other program runs, which could take it.
    let line = sys::socket::connect_vsock(rpc::PORT).context("the host does not accept the agent's line")?;
    let mut waiters = Waiters::listen().context("cannot listen on the forkpoint socket")?;
    ready::Workload { config: &config, environment: &template, reaper: &mut reaper, waiters: &mut waiters }
        .bring_up()?;
    let forkpoint =
        Forkpoint::new(waiters, config.on_fork, template.clone()).context("cannot allocate the mailbox")?;
    let mut server = Server::new(listeners, reaper, template, Some(forkpoint))?;
    server.add_connection(line);
    boot::compact();
    console::say("ready to be forked");
    server.pass_forkpoint()?;
    Ok(server.run()?)
}

/// Serves RPC on one Unix socket, and streams to ports on another, as an ordinary process, without forkpoints: for tests
/// and for development on a host.
fn serve_unix(arguments: &[String]) -> anyhow::Result<Infallible> {
    let usage = "usage: forkling-agent --serve-unix PATH FORWARD_PATH (or as PID 1)";
    let [option, path, forward] = arguments else { bail!(usage) };
    if option != "--serve-unix" {
        bail!("unknown option {option}; {usage}");
    }
    // Orphans come to PID 1 in a guest; here to this process.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).context("cannot adopt orphans")?;
    let listen = |path: &str| -> anyhow::Result<OwnedFd> {
        let listener = UnixListener::bind(path).with_context(|| format!("cannot listen on {path}"))?;
        listener.set_nonblocking(true)?;
        Ok(OwnedFd::from(listener))
    };
    let listeners = Listeners { forward: listen(forward)?, rpc: listen(path)? };
    std::env::set_current_dir("/").context("cannot enter /")?;
    let reaper = Reaper::new().context("cannot watch for processes that end")?;
    let mut server = Server::new(listeners, reaper, command::base_environment(&[]), None)?;
    Ok(server.run()?)
}
