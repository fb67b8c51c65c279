//! A stream of the daemon's own to a port of a guest's loopback.

use std::os::fd::{AsFd, OwnedFd};

use forkling_proto::forward::{self, Verdict};
use forkling_vmm::protocol::Opening;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};

use crate::{
    api::error::{Code, Error},
    fork::Fork,
    limits::TUNNEL_TIMEOUT,
};

/// Connects to TCP port `port` of the guest's loopback.
pub async fn tunnel(fork: &Fork, port: u16) -> Result<UnixStream, Error> {
    match timeout(TUNNEL_TIMEOUT, ask(fork, port)).await {
        Ok(Ok((stream, Ok(Verdict::Connected)))) => Ok(stream),
        Ok(Ok((_, Ok(Verdict::Closed)))) => {
            let message = format!("nobody listens on port {port} of the loopback of fork {}", fork.id);
            Err(Error::new(Code::GuestPortClosed, message))
        }
        Ok(Ok((_, Ok(Verdict::Failed)))) => {
            let message = format!("the guest of fork {} cannot connect to its port {port}", fork.id);
            Err(Error::new(Code::GuestRefused, message)
                .because("its kernel refused, or it has 256 such streams"))
        }
        Ok(Ok((_, Err(other)))) => Err(unreachable(fork, port).because(format!("it answered {other}"))),
        Ok(Err(error)) => Err(fork.explain(unreachable(fork, port).because(error)).await),
        Err(_) => Err(fork.explain(unreachable(fork, port).because("it did not answer in time")).await),
    }
}

fn unreachable(fork: &Fork, port: u16) -> Error {
    let message = format!("the agent of fork {} did not connect to port {port}", fork.id);
    Error::new(Code::AgentUnreachable, message)
}

async fn ask(fork: &Fork, port: u16) -> anyhow::Result<(UnixStream, Result<Verdict, u8>)> {
    let (mut ours, theirs) = UnixStream::pair()?;
    let theirs = OwnedFd::from(theirs.into_std()?);
    fork.connect(forward::PORT, Opening::Plain, theirs.as_fd()).await?;
    drop(theirs);
    ours.write_all(&forward::header(port)).await?;
    let verdict = Verdict::try_from(ours.read_u8().await?);
    Ok((ours, verdict))
}
