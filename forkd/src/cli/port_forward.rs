//! `forkling port-forward`, `tunnel`, `vsock`.

use std::{net::IpAddr, process::ExitCode, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    signal::unix::{SignalKind, signal},
};

use super::{
    client::{Client, Failure, segment},
    output::Output,
};
use crate::api::{
    TUNNEL_PROTOCOL,
    types::{ForwardPort, PortInfo, Ports, VsockInfo},
};

/// How often is looked whether the fork still lives.
const LOOK: Duration = Duration::from_secs(1);

/// Bytes read at once.
const CHUNK: usize = 64 << 10;

/// A pair of ports, as kubectl writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pair {
    /// 0: any that is free.
    host: u16,
    guest: u16,
}

/// `GUEST`, `HOST:GUEST` or `:GUEST`.
fn pair(text: &str) -> Result<Pair, String> {
    let number = |part: &str| part.parse::<u16>().map_err(|_| format!("{part:?} is not a port"));
    let (host, guest) = match text.split_once(':') {
        None => (number(text)?, number(text)?),
        Some(("", guest)) => (0, number(guest)?),
        Some((host, guest)) => (number(host)?, number(guest)?),
    };
    if guest == 0 { Err("0 is no port of a guest".to_owned()) } else { Ok(Pair { host, guest }) }
}

/// Forwards ports.
#[derive(Debug, clap::Args)]
pub struct PortForward {
    /// The fork's id or name
    fork: String,
    /// Ports: GUEST for the same on both sides, HOST:GUEST, or :GUEST for any that is free on this host
    #[arg(required = true, value_name = "[HOST:]GUEST", value_parser = pair)]
    ports: Vec<Pair>,
    /// Address of the loopback to listen on
    #[arg(long, default_value = "127.0.0.1", value_name = "IP")]
    address: IpAddr,
}

impl PortForward {
    /// Runs it until it is interrupted, or the fork dies.
    pub async fn run(self, client: &Client, output: Output) -> Result<ExitCode, Failure> {
        let local = |error: std::io::Error| Failure::Local(format!("cannot wait for signals: {error}"));
        let (mut terminate, mut interrupt) = (
            signal(SignalKind::terminate()).map_err(local)?,
            signal(SignalKind::interrupt()).map_err(local)?,
        );
        let path = format!("/v1/forks/{}/ports", segment(&self.fork));
        let mut made = Vec::new();
        // Not interrupted half-way: a port whose id nobody heard would stay.
        let outcome = match self.open(client, output, &path, &mut made).await {
            Ok(()) => tokio::select! {
                failure = until_gone(client, &path) => Err(failure),
                _ = terminate.recv() => Ok(()),
                _ = interrupt.recv() => Ok(()),
            },
            failed => failed,
        };
        for id in made {
            // It is gone already if the fork is.
            let _ = client.delete(&format!("{path}/{id}")).await;
        }
        outcome.map(|()| ExitCode::SUCCESS)
    }

    async fn open(
        &self,
        client: &Client,
        output: Output,
        path: &str,
        made: &mut Vec<String>,
    ) -> Result<(), Failure> {
        for Pair { host, guest } in &self.ports {
            let host = std::net::SocketAddr::new(self.address, *host).to_string();
            let request = ForwardPort { guest_port: u32::from(*guest), host: Some(host), unix: None };
            let port: PortInfo = client.post(path, &request).await?;
            made.push(port.id.clone());
            if output.json {
                output.print(&port);
            } else {
                println!("forwarding {} -> {}", port.host.as_deref().unwrap_or_default(), port.guest_port);
            }
        }
        Ok(())
    }
}

/// Waits until the fork cannot be asked any more, and returns why.
async fn until_gone(client: &Client, path: &str) -> Failure {
    loop {
        tokio::time::sleep(LOOK).await;
        if let Err(failure) = client.get::<Ports>(path).await {
            return failure;
        }
    }
}

/// Joins standard input and output with a port.
#[derive(Debug, clap::Args)]
pub struct Tunnel {
    /// The fork's id or name
    fork: String,
    /// TCP port of the guest's loopback
    port: u16,
}

impl Tunnel {
    /// Runs it until the guest's server closes.
    pub async fn run(self, client: &Client, _: Output) -> Result<ExitCode, Failure> {
        let path = format!("/v1/forks/{}/tunnel?port={}", segment(&self.fork), self.port);
        let stream = client.upgrade(&path, TUNNEL_PROTOCOL).await?;
        let (mut reader, mut writer) = tokio::io::split(stream);
        // What it fails with, the other direction shows.
        let input = tokio::spawn(async move {
            let _ = tokio::io::copy(&mut tokio::io::stdin(), &mut writer).await;
            let _ = writer.shutdown().await;
        });
        let failed = |error: std::io::Error| Failure::Local(format!("the tunnel broke: {error}"));
        let (mut stdout, mut buffer) = (tokio::io::stdout(), vec![0; CHUNK]);
        loop {
            let count = reader.read(&mut buffer).await.map_err(failed)?;
            if count == 0 {
                input.abort();
                return Ok(ExitCode::SUCCESS);
            }
            stdout.write_all(&buffer[..count]).await.map_err(failed)?;
            stdout.flush().await.map_err(failed)?;
        }
    }
}

/// Opens a vsock socket.
#[derive(Debug, clap::Args)]
pub struct Vsock {
    /// The fork's id or name
    fork: String,
}

impl Vsock {
    /// Runs it.
    pub async fn run(self, client: &Client, output: Output) -> Result<ExitCode, Failure> {
        let path = format!("/v1/forks/{}/vsock", segment(&self.fork));
        let vsock: VsockInfo = client.post(&path, &()).await?;
        if output.json {
            output.print(&vsock);
        } else {
            println!("{}", vsock.path);
        }
        Ok(ExitCode::SUCCESS)
    }
}

#[cfg(test)]
mod tests;
