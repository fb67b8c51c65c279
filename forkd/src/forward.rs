//! Ports of the host that lead to ports of a guest's loopback, and what else leads into a fork.
//!
//! The daemon accepts, and hands each connection to the fork's process, which joins it with the guest's agent by vsock; so
//! no byte passes the daemon, and a guest needs no network. The fork reports what became of each connection.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use forkling_proto::forward;
use forkling_vmm::protocol::{Opening, Passage, ToFork};
use tokio::{
    net::{TcpListener, UnixListener},
    task::JoinHandle,
    time::sleep,
};

use crate::{
    api::{
        error::{Code, Error, chain},
        types::{PortConnections, PortInfo},
    },
    config::Config,
    fork::Fork,
    limits::MAX_PORTS,
    vsock::{self, Directory, Name},
};

pub use tunnel::tunnel;

mod tunnel;

/// How long to wait before accepting again when the host was out of something.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

/// What leads into a fork and out of it, beside its agent.
#[derive(Debug, Default)]
pub struct Ways {
    /// Held for writing while the fork is reset: connections wait.
    pub gate: tokio::sync::RwLock<()>,
    /// Path of its vsock socket, if that was asked for.
    pub vsock: tokio::sync::Mutex<Option<PathBuf>>,
    /// Whether its guest may connect to the host.
    offers_ports: AtomicBool,
    directory: Mutex<Weak<Directory>>,
    ports: Mutex<Ports>,
}

#[derive(Debug, Default)]
struct Ports {
    /// Numbers are not used twice, so late news of a port that is gone find nothing.
    last: u32,
    open: BTreeMap<u32, Port>,
}

/// A forwarded port.
#[derive(Debug)]
struct Port {
    guest_port: u16,
    at: At,
    connections: PortConnections,
    task: JoinHandle<()>,
}

/// Where a port is to be, or is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum At {
    /// On the loopback.
    Tcp(SocketAddr),
    /// In the fork's directory.
    Unix(PathBuf),
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// The name of a Unix socket, removed with its listener, and the directory it is in.
type Held = Option<(Name, Arc<Directory>)>;

impl Ways {
    /// The fork's directory, made if it is not there. It goes with its last user.
    pub fn directory(&self, config: &Config, fork: &Fork) -> Result<Arc<Directory>, Error> {
        let mut directory = self.directory.lock().expect("no panic under this lock");
        if let Some(directory) = directory.upgrade() {
            return Ok(directory);
        }
        let made = Directory::make(&config.runtime_dir, &fork.id).map_err(|error| {
            let message = format!("fork {} cannot have a directory for its sockets", fork.id);
            Error::new(Code::SocketFailed, message).because(chain(&error))
        })?;
        let made = Arc::new(made);
        *directory = Arc::downgrade(&made);
        Ok(made)
    }

    /// Lets the guest connect to the host, from now on and after each reset.
    pub fn offer_ports(&self) {
        self.offers_ports.store(true, Ordering::Relaxed);
    }

    /// Whether the guest may connect to the host.
    pub fn offers_ports(&self) -> bool {
        self.offers_ports.load(Ordering::Relaxed)
    }

    /// The fork was rewound: its connections are gone.
    pub fn rewound(&self) {
        for port in self.ports().open.values_mut() {
            port.connections.open = 0;
        }
    }

    /// Counts what became of a forwarded connection.
    pub fn passed(&self, group: u32, passage: Passage) {
        let mut ports = self.ports();
        let Some(Port { connections, .. }) = ports.open.get_mut(&group) else { return };
        match passage {
            Passage::Accepted => connections.open += 1,
            Passage::Refused => connections.refused += 1,
            Passage::Ended => connections.open = connections.open.saturating_sub(1),
        }
    }

    /// All forwarded ports, oldest first.
    pub fn list(&self) -> Vec<PortInfo> {
        self.ports().open.iter().map(|(number, port)| port.info(*number)).collect()
    }

    fn ports(&self) -> MutexGuard<'_, Ports> {
        self.ports.lock().expect("no panic under this lock")
    }
}

impl Port {
    fn info(&self, number: u32) -> PortInfo {
        let (host, unix) = match &self.at {
            At::Tcp(address) => (Some(address.to_string()), None),
            At::Unix(path) => (None, Some(path.display().to_string())),
        };
        let (guest_port, connections) = (self.guest_port, self.connections);
        PortInfo { id: number.to_string(), guest_port, host, unix, connections }
    }
}

/// Where a request wants its port: a loopback address, or a valid name in the fork's directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// A loopback address; port 0 for any.
    Tcp(SocketAddr),
    /// A name.
    Unix(String),
}

/// Forwards a port of the guest. It ends with the fork.
pub fn open(config: &Config, fork: &Arc<Fork>, guest_port: u16, wanted: &Wanted) -> Result<PortInfo, Error> {
    // Nothing below waits, so the lock makes two requests come one after the other.
    let mut ports = fork.ways.ports();
    if ports.open.len() >= MAX_PORTS {
        let message = format!("fork {} has {MAX_PORTS} forwarded ports, the most possible", fork.id);
        return Err(Error::new(Code::TooManyPorts, message));
    }
    let (listener, at, held): (_, _, Held) = match wanted {
        Wanted::Tcp(address) => {
            let listening = listen_tcp(*address);
            let (listener, at) = listening.map_err(|error| refused(&address.to_string(), error))?;
            (listener, at, None)
        }
        Wanted::Unix(name) => {
            let directory = fork.ways.directory(config, fork)?;
            let path = directory.path().join(name);
            vsock::check_length(&path, 0)?;
            let listener = vsock::bind(&path).and_then(UnixListener::from_std);
            let listener = listener.map_err(|error| refused(&path.display().to_string(), error))?;
            (Listener::Unix(listener), At::Unix(path.clone()), Some((Name(path), directory)))
        }
    };
    ports.last += 1;
    let number = ports.last;
    let task = tokio::spawn(serve(fork.clone(), number, guest_port, listener, held));
    let port = Port { guest_port, at, connections: PortConnections::default(), task };
    let info = port.info(number);
    ports.open.insert(number, port);
    Ok(info)
}

fn listen_tcp(address: SocketAddr) -> io::Result<(Listener, At)> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let at = At::Tcp(listener.local_addr()?);
    Ok((Listener::Tcp(TcpListener::from_std(listener)?), at))
}

fn refused(what: &str, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::AddrInUse => Error::new(Code::AddressInUse, format!("{what} is in use")),
        _ => Error::new(Code::AddressUnavailable, format!("cannot listen on {what}")).because(error),
    }
}

/// Ends a forwarded port and its connections.
pub async fn close(fork: &Fork, id: &str) -> Result<(), Error> {
    let number = id.parse().ok();
    let port = number.and_then(|number: u32| fork.ways.ports().open.remove(&number));
    let Some((number, port)) = number.zip(port) else {
        let message = format!("fork {} has no forwarded port {id}", fork.id);
        return Err(Error::new(Code::PortNotFound, message));
    };
    port.task.abort();
    // Gone when the answer says so.
    let _ = port.task.await;
    // A fork that has gone has no connections either.
    let _ = fork.send_running(&ToFork::Cut { group: number }, &[]).await;
    Ok(())
}

/// Accepts until the fork is dead.
async fn serve(fork: Arc<Fork>, number: u32, guest_port: u16, listener: Listener, held: Held) {
    let accept = async {
        loop {
            match listener.accept().await {
                Ok(stream) => hand_over(&fork, number, guest_port, &stream).await,
                Err(error) => {
                    tracing::debug!(fork = fork.id, number, %error, "cannot accept on a forwarded port");
                    sleep(PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        () = fork.died() => {}
        () = accept => {}
    }
    drop((listener, held));
    fork.ways.ports().open.remove(&number);
}

async fn hand_over(fork: &Fork, number: u32, guest_port: u16, stream: &OwnedFd) {
    if let Some(port) = fork.ways.ports().open.get_mut(&number) {
        port.connections.total += 1;
    }
    let opening = Opening::Forwarded { group: number, first: forward::header(guest_port).to_vec() };
    if fork.connect(forward::PORT, opening, stream.as_fd()).await.is_err() {
        fork.ways.passed(number, Passage::Refused);
    }
}

impl Listener {
    async fn accept(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(stream.into_std()?.into())
            }
            Self::Unix(listener) => Ok(listener.accept().await?.0.into_std()?.into()),
        }
    }
}

#[cfg(test)]
mod tests;
