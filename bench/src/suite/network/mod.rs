//! What the network carries: bulk and round trips between a guest and its host, beside the host's loopback and a guest of
//! QEMU with its user network. All run the same endpoint; the host's clock measures.

mod qemu;
mod server;

#[path = "../../endpoint/protocol.rs"]
mod protocol;

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, ensure};
use serde_json::json;

use crate::{
    bench::{Bench, Fork, Places, Source},
    results::Results,
};
use server::{Measured, Server};

/// The guest's end, beside the other programs.
const ENDPOINT: &str = "forkling-endpoint";

/// Where a guest knows its host.
const HOST: &str = "169.254.1.2";

/// Port of the vsock to the host.
const VSOCK_PORT: u32 = 7000;

/// Takes the figures.
pub fn take(bench: &mut Bench, places: &Places, results: &Results, quick: bool) -> anyhow::Result<()> {
    if quick {
        return Ok(());
    }
    let endpoint = places.programs.join(ENDPOINT);
    let loopback = results.beside("loopback");
    if loopback.wants(&["tcp"]) {
        ensure!(endpoint.exists(), "{} is missing; build the workspace first", endpoint.display());
        record(&loopback, "tcp", &over_loopback(&endpoint)?, "over the host's loopback")?;
    }
    if results.wants(&["net"]) {
        fork(bench, &endpoint, results)?;
    }
    let user = results.beside("qemu_user");
    match &places.qemu {
        _ if !user.wants(&["tcp"]) => {}
        None => user.skip("tcp", "no QEMU was brought (--qemu)"),
        Some(qemu) => {
            let measured = qemu::over_user_network(qemu, places, &endpoint)?;
            record(&user, "tcp", &measured, "QEMU with KVM, microvm, -netdev user, the same guest kernel")?;
        }
    }
    Ok(())
}

/// Records the three figures as `WHAT_g2h`, `WHAT_h2g`, `WHAT_rr`.
fn record(results: &Results, what: &str, measured: &Measured, note: &str) -> anyhow::Result<()> {
    let Measured { sent, received, round_trips } = measured.clone();
    results.record(&format!("{what}_g2h"), "Gbit/s", sent, Some(note))?;
    results.record(&format!("{what}_h2g"), "Gbit/s", received, Some(note))?;
    results.record(&format!("{what}_rr"), "us", round_trips, Some(note))
}

fn over_loopback(endpoint: &Path) -> anyhow::Result<Measured> {
    let (server, port) = Server::tcp(endpoint.to_owned())?;
    let status = Command::new(endpoint).arg(format!("127.0.0.1:{port}")).status().context("the endpoint")?;
    ensure!(status.success(), "the endpoint failed: {status}");
    server.finish()
}

/// A fork over TCP and over vsock.
fn fork(bench: &mut Bench, endpoint: &Path, results: &Results) -> anyhow::Result<()> {
    bench.drop_pool()?;
    let fork = bench.fork(Source::New)?.1;
    let path = format!("/v1/forks/{}/network", fork.id);
    bench.connection.call("PUT", &path, Some(&json!({"egress": ["host"]})))?;
    let (server, port) = Server::tcp(endpoint.to_owned())?;
    fetch(bench, &fork, port)?;
    bench.exec(&fork, &["/tmp/endpoint", &format!("{HOST}:{port}")])?;
    record(results, "net.tcp", &server.finish()?, "one connection between guest and host")?;
    let opened = bench.connection.call("POST", &format!("/v1/forks/{}/vsock", fork.id), None)?;
    let path = opened["path"].as_str().context("the path of a vsock socket")?;
    let server = Server::unix(&PathBuf::from(format!("{path}_{VSOCK_PORT}")), endpoint.to_owned())?;
    bench.exec(&fork, &["/tmp/endpoint", &format!("vsock:{VSOCK_PORT}")])?;
    record(results, "net.vsock", &server.finish()?, "one connection from the guest")?;
    bench.destroy(&fork)
}

/// Has the fork fetch the endpoint over its own network.
fn fetch(bench: &mut Bench, fork: &Fork, port: u16) -> anyhow::Result<()> {
    let wanted = char::from(server::PROGRAM);
    let line = format!(
        "exec 3<>/dev/tcp/{HOST}/{port} && printf {wanted} >&3 && cat <&3 >/tmp/endpoint && chmod +x /tmp/endpoint"
    );
    bench.exec(fork, &["bash", "-c", &line]).map(drop)
}
