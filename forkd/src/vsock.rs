//! A fork's vsock as a Unix socket, after Firecracker's convention (its docs/vsock.md).
//!
//! A client connects, writes `CONNECT <port>\n`, and reads `OK <host port>\n` when the guest has accepted; then the stream
//! is the guest's. A guest that connects to host port P gets whoever listens on `<path>_<P>`. Connections are handed to the
//! fork's process with their first line read: bytes never pass the daemon.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use forkling_vmm::protocol::{Opening, ToFork};
use rustix::{
    fs::{FileType, Mode, OFlags},
    net::{RecvFlags, recv},
};
use tokio::{
    io::Interest,
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    time::{sleep, timeout},
};

use crate::{
    api::error::{Code, Error, chain},
    config::{Config, MAX_SOCKET_PATH},
    control,
    fork::Fork,
    limits::{DIAL_TIMEOUT, GREETING_TIMEOUT, MAX_GREETINGS},
};

pub use directory::{Directory, bind, sweep};

mod directory;

/// Name of the socket in a fork's directory.
pub const NAME: &str = "vsock.sock";

/// What the longest port adds to it.
const LONGEST_SUFFIX: usize = "_4294967295".len();

/// Longest first line of a client in bytes, with its end.
const MAX_LINE: usize = 32;

/// How long to wait before accepting again when the host was out of something.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

/// Opens the socket of a fork, if it is not open yet, and lets its guest connect to the host. The socket goes with the fork.
pub async fn open(config: &Config, fork: &Arc<Fork>) -> Result<PathBuf, Error> {
    let mut open = fork.ways.vsock.lock().await;
    if let Some(path) = open.as_ref() {
        return Ok(path.clone());
    }
    let directory = fork.ways.directory(config, fork)?;
    let path = directory.path().join(NAME);
    check_length(&path, LONGEST_SUFFIX)?;
    let listener = bind(&path).and_then(UnixListener::from_std).map_err(|error| {
        Error::new(Code::SocketFailed, format!("cannot listen on {}", path.display())).because(error)
    })?;
    fork.ways.offer_ports();
    let told = fork.send_running(&ToFork::OfferPorts, NO_FDS).await;
    if let Err(error) = told {
        let message = format!("the process of fork {} cannot be reached", fork.id);
        return Err(fork.explain(Error::new(Code::ForkFailed, message).because(chain(&error))).await);
    }
    tokio::spawn(serve(fork.clone(), listener, directory));
    *open = Some(path.clone());
    Ok(path)
}

const NO_FDS: &[BorrowedFd<'_>] = &[];

/// Refuses a path that is no address of a socket, or would not be with `suffix` more bytes.
pub fn check_length(path: &Path, suffix: usize) -> Result<(), Error> {
    let len = path.as_os_str().len() + suffix;
    if len <= MAX_SOCKET_PATH {
        return Ok(());
    }
    let message =
        format!("socket path {} would have {len} bytes, more than {MAX_SOCKET_PATH}", path.display());
    Err(Error::new(Code::PathTooLong, message))
}

/// Accepts clients until the fork is dead. The directory goes with its last user.
async fn serve(fork: Arc<Fork>, listener: UnixListener, directory: Arc<Directory>) {
    let greetings = Arc::new(Semaphore::new(MAX_GREETINGS));
    let accept = async {
        loop {
            let permit = greetings.clone().acquire_owned().await.expect("it is never closed");
            match listener.accept().await {
                Ok((stream, _)) => {
                    let fork = fork.clone();
                    tokio::spawn(async move {
                        let _permit = permit;
                        if let Err(error) = greet(&fork, stream).await {
                            tracing::debug!(fork = fork.id, error = chain(&error), "vsock client dropped");
                        }
                    });
                }
                Err(error) => {
                    tracing::debug!(fork = fork.id, %error, "cannot accept on the vsock socket");
                    sleep(PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        () = fork.died() => {}
        () = accept => {}
    }
    drop((listener, directory));
}

/// Why a client is dropped.
#[derive(Debug, thiserror::Error)]
enum GreetError {
    #[error("its stream failed")]
    Io(#[from] io::Error),
    #[error("its first line is not CONNECT and a port")]
    Line,
    #[error("it said nothing in time")]
    Late,
    #[error("the fork cannot be reached")]
    Fork(#[from] control::Error),
}

/// Reads what a client wants and hands it over. On an error it is closed, which is all the convention knows.
async fn greet(fork: &Fork, stream: UnixStream) -> Result<(), GreetError> {
    let port = timeout(GREETING_TIMEOUT, read_port(&stream)).await.map_err(|_| GreetError::Late)??;
    let stream = OwnedFd::from(stream.into_std()?);
    Ok(fork.connect(port, Opening::Announced, stream.as_fd()).await?)
}

/// Reads the first line and not a byte more: what follows is the guest's.
async fn read_port(stream: &UnixStream) -> Result<u32, GreetError> {
    let mut line = Vec::with_capacity(MAX_LINE);
    loop {
        let mut ahead = [0; MAX_LINE];
        let room = &mut ahead[..MAX_LINE - line.len()];
        let seen = receive(stream, room, RecvFlags::PEEK).await?;
        let end = room[..seen].iter().position(|&byte| byte == b'\n');
        let taken = receive(stream, &mut room[..end.map_or(seen, |end| end + 1)], RecvFlags::empty()).await?;
        line.extend_from_slice(&room[..taken]);
        if line.ends_with(b"\n") {
            return parse(&line).ok_or(GreetError::Line);
        }
        if taken == 0 || line.len() == MAX_LINE {
            return Err(GreetError::Line);
        }
    }
}

async fn receive(stream: &UnixStream, buffer: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
    stream
        .async_io(Interest::READABLE, || Ok(recv(stream, &mut *buffer, flags | RecvFlags::DONTWAIT)?.0))
        .await
}

/// The port of a first line. As lenient as Firecracker: any case of the word, any white space.
fn parse(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let is_connect = words.next()?.eq_ignore_ascii_case("connect");
    let port = words.next()?.parse().ok()?;
    (is_connect && words.next().is_none()).then_some(port)
}

/// Finds who listens for a guest that connects to host port `port`, and tells the fork. Nobody is an answer too.
pub fn answer(fork: Arc<Fork>, token: u64, port: u32) {
    tokio::spawn(async move {
        let found = timeout(DIAL_TIMEOUT, find(&fork, port)).await;
        let stream = match found {
            Ok(Ok(stream)) => Some(stream),
            Ok(Err(error)) => {
                tracing::debug!(fork = fork.id, port, %error, "the guest is refused a host port");
                None
            }
            Err(_) => None,
        };
        let fds: Vec<_> = stream.iter().map(AsFd::as_fd).collect();
        // A fork that has gone needs no answer; its supervisor knows.
        let _ = fork.send_running(&ToFork::Dialled { token }, &fds).await;
    });
}

async fn find(fork: &Fork, port: u32) -> io::Result<OwnedFd> {
    let path = fork.ways.vsock.lock().await.clone().ok_or(io::ErrorKind::NotFound)?;
    let mut name = path.into_os_string();
    name.push(format!("_{port}"));
    // Whoever may write the directory may connect to the daemon, but perhaps not to all that the daemon may connect to: a
    // link is not followed, and what was looked at is what is connected to.
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let socket = rustix::fs::open(Path::new(&name), flags, Mode::empty())?;
    if FileType::from_raw_mode(rustix::fs::fstat(&socket)?.st_mode) != FileType::Socket {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a socket"));
    }
    let stream = UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await?;
    Ok(stream.into_std()?.into())
}

/// Removes a socket's name when it is dropped.
#[derive(Debug)]
pub struct Name(pub PathBuf);

impl Drop for Name {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests;
