//! The guest's end of the network's figures: small and static, the same in a fork, in a guest of QEMU and on the host.
//!
//! `forkling-endpoint ADDRESS:PORT` connects by TCP, `forkling-endpoint vsock:PORT` to the host by vsock.
#![forbid(unsafe_code)]

mod protocol;

use std::{
    io::{Read as _, Write as _},
    net::SocketAddr,
};

use anyhow::{Context as _, bail};
use protocol::{BULK, DONE, ECHO, PIECE, RECEIVE, SEND};
use socket2::{Domain, SockAddr, Socket, Type};

/// The host's context id on vsock.
const HOST: u32 = 2;

/// Bulk transfers of each direction; the first warms up.
const TRANSFERS: usize = 4;

fn main() -> anyhow::Result<()> {
    let Some(place) = std::env::args().nth(1) else {
        bail!("usage: forkling-endpoint ADDRESS:PORT | vsock:PORT")
    };
    let mut buffer = vec![0x5a; PIECE];
    for _ in 0..TRANSFERS {
        send(connect(&place, SEND)?, &buffer)?;
    }
    for _ in 0..TRANSFERS {
        receive(connect(&place, RECEIVE)?, &mut buffer)?;
    }
    echo(connect(&place, ECHO)?)?;
    connect(&place, DONE).map(drop)
}

/// Connects and says what it is for.
fn connect(place: &str, kind: u8) -> anyhow::Result<Socket> {
    let mut socket = match place.strip_prefix("vsock:") {
        Some(port) => {
            let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
            let address = SockAddr::vsock(HOST, port.parse().context("a vsock port")?);
            socket.connect(&address).context("cannot connect by vsock")?;
            socket
        }
        None => {
            let address: SocketAddr = place.parse().context("an address and a port")?;
            let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
            socket.connect(&address.into()).with_context(|| format!("cannot connect to {address}"))?;
            socket.set_tcp_nodelay(true)?;
            socket
        }
    };
    socket.write_all(&[kind])?;
    Ok(socket)
}

fn send(mut socket: Socket, piece: &[u8]) -> anyhow::Result<()> {
    for _ in 0..BULK / piece.len() {
        socket.write_all(piece)?;
    }
    Ok(socket.read_exact(&mut [0])?)
}

fn receive(mut socket: Socket, buffer: &mut [u8]) -> anyhow::Result<()> {
    let mut left = BULK;
    while left > 0 {
        match socket.read(buffer)? {
            0 => bail!("{left} bytes are missing"),
            count => left = left.saturating_sub(count),
        }
    }
    Ok(socket.write_all(&[0])?)
}

fn echo(mut socket: Socket) -> anyhow::Result<()> {
    let mut byte = [0];
    while socket.read(&mut byte)? > 0 {
        socket.write_all(&byte)?;
    }
    Ok(())
}
