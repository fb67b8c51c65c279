//! The host's end: serves an endpoint, and takes the times.

use std::{
    fs::File,
    io::{self, Read, Write},
    net::TcpListener,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

use super::protocol::{BULK, DONE, ECHO, PIECE, RECEIVE, SEND};

/// What a guest says that wants the endpoint's program.
pub const PROGRAM: u8 = b'p';

/// Round trips, after as many that warm up.
const ROUND_TRIPS: usize = 100;

/// Longest run of an endpoint, lab time included.
const PATIENCE: Duration = Duration::from_secs(600);

/// What an endpoint came to, as the host's clock saw it.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Gbit/s from the endpoint, a transfer each.
    pub sent: Vec<f64>,
    /// Gbit/s to the endpoint, a transfer each.
    pub received: Vec<f64>,
    /// Microseconds of a byte to the endpoint and back.
    pub round_trips: Vec<f64>,
}

/// A server on a thread of its own, until its endpoint is done.
pub struct Server {
    measured: mpsc::Receiver<anyhow::Result<Measured>>,
}

impl Server {
    /// On a loopback port, which is returned with it. `program` is what a guest gets that asks for the endpoint.
    pub fn tcp(program: PathBuf) -> anyhow::Result<(Self, u16)> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let port = listener.local_addr()?.port();
        let accept = move || {
            let stream = listener.accept()?.0;
            stream.set_nodelay(true)?;
            Ok(stream)
        };
        Ok((Self::start(accept, program), port))
    }

    /// On a Unix socket.
    pub fn unix(path: &Path, program: PathBuf) -> anyhow::Result<Self> {
        let listener =
            UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
        Ok(Self::start(move || Ok(listener.accept()?.0), program))
    }

    fn start<S: Read + Write>(accept: impl Fn() -> io::Result<S> + Send + 'static, program: PathBuf) -> Self {
        let (sender, measured) = mpsc::channel();
        thread::spawn(move || sender.send(serve(accept, &program)));
        Self { measured }
    }

    /// What came out. Errors: the endpoint failed, or does not end.
    pub fn finish(self) -> anyhow::Result<Measured> {
        self.measured.recv_timeout(PATIENCE).context("the endpoint does not end")?
    }
}

fn serve<S: Read + Write>(accept: impl Fn() -> io::Result<S>, program: &Path) -> anyhow::Result<Measured> {
    let mut measured = Measured::default();
    let mut buffer = vec![0x5a; PIECE];
    loop {
        let mut stream = accept().context("cannot accept")?;
        let mut kind = [0];
        stream.read_exact(&mut kind)?;
        match kind[0] {
            SEND => measured.sent.push(take(&mut stream, &mut buffer)?),
            RECEIVE => measured.received.push(give(&mut stream, &buffer)?),
            ECHO => {
                measured.round_trips = (0..2 * ROUND_TRIPS)
                    .map(|_| round_trip(&mut stream))
                    .collect::<anyhow::Result<Vec<_>>>()?
                    .split_off(ROUND_TRIPS)
            }
            PROGRAM => {
                io::copy(&mut File::open(program)?, &mut stream)?;
            }
            DONE => break,
            other => bail!("an endpoint wants {other:#x}"),
        }
    }
    for warm_up in [&mut measured.sent, &mut measured.received] {
        if !warm_up.is_empty() {
            warm_up.remove(0);
        }
    }
    Ok(measured)
}

fn gbit_per_s(began: Instant) -> f64 {
    BULK as f64 * 8.0 / began.elapsed().as_nanos() as f64
}

fn take(stream: &mut (impl Read + Write), buffer: &mut [u8]) -> anyhow::Result<f64> {
    let began = Instant::now();
    let mut left = BULK;
    while left > 0 {
        match stream.read(buffer)? {
            0 => bail!("{left} bytes of a transfer are missing"),
            count => left = left.saturating_sub(count),
        }
    }
    let rate = gbit_per_s(began);
    stream.write_all(&[0])?;
    Ok(rate)
}

fn give(stream: &mut (impl Read + Write), piece: &[u8]) -> anyhow::Result<f64> {
    let began = Instant::now();
    for _ in 0..BULK / piece.len() {
        stream.write_all(piece)?;
    }
    stream.read_exact(&mut [0])?;
    Ok(gbit_per_s(began))
}

fn round_trip(stream: &mut (impl Read + Write)) -> anyhow::Result<f64> {
    let began = Instant::now();
    stream.write_all(&[0])?;
    stream.read_exact(&mut [0])?;
    Ok(began.elapsed().as_nanos() as f64 / 1e3)
}
