//! The life of one fork: made by its template's zygote, activated, watched, and buried.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use forkling_proto::rpc;
use forkling_vmm::protocol::{Failure, Opening, ToFork};
use tokio::{
    net::UnixStream,
    sync::{oneshot, watch},
};

use crate::{
    agent::Connection,
    api::{
        error::{Code, Error},
        types::{Death, ForkInfo, ForkState, Timings},
    },
    control::{self, Socket},
    forward::Ways,
    identity::Identity,
    process::Process,
    template::Template,
};

pub use console::Console;
pub use create::{Request, create};
pub use network::{Attached, NetworkChoice, not_had, policy, supported, unavailable};
pub use park::{Error as ParkError, Parked, Stages, Touched, park, touched};
pub use timings::monotonic_ns;

use reset::Progress;

mod console;
mod create;
mod make;
mod network;
mod park;
mod reset;
mod supervise;
mod timings;

/// Reason of a death: its memory cannot be had.
pub const MEMORY: &str = "memory";

/// Reason of a death: its template's snapshot is damaged.
pub const SNAPSHOT: &str = "snapshot";

/// Where a fork is in its life.
#[derive(Clone, Debug)]
pub enum Status {
    /// Being made.
    Creating,
    /// Acknowledged.
    Running(Timings),
    /// Gone, or certain to go.
    Died(Death),
}

/// One fork.
#[derive(Debug)]
pub struct Fork {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: Option<String>,
    /// What it is a fork of.
    pub template: Arc<Template>,
    /// As given by the caller.
    pub metadata: Arc<BTreeMap<String, String>>,
    /// Milliseconds since 1970.
    pub created_unix_ms: u64,
    /// Whether it came out of the pool.
    pub parked: bool,
    identity: Mutex<Identity>,
    pid: OnceLock<i32>,
    /// Whether the pager serves it.
    paged: AtomicBool,
    /// What it holds of the kernel; a record of the dead holds nothing.
    handles: Mutex<Handles>,
    status: watch::Sender<Status>,
    buried: watch::Sender<bool>,
    console: Mutex<Console>,
    agent: tokio::sync::Mutex<Option<Arc<Connection>>>,
    /// Its NIC's side of the network, while it lives.
    attached: Mutex<Option<Arc<Attached>>>,
    /// Who waits for the end of a save.
    save: Mutex<Option<oneshot::Sender<Result<(), Failure>>>>,
    /// Held during a save: one at a time.
    saving: tokio::sync::Mutex<()>,
    progress: watch::Sender<Progress>,
    /// From the host into its guest and back, beside its agent.
    pub ways: Ways,
    /// When its latest activation was asked for; CLOCK_MONOTONIC in nanoseconds.
    received_ns: AtomicU64,
}

#[derive(Debug)]
struct Handles {
    socket: Option<Arc<Socket>>,
    process: Option<Arc<Process>>,
}

impl Fork {
    /// `agent` is a connection that a parked fork has already.
    fn new(
        identity: Identity,
        socket: Arc<Socket>,
        request: &Request,
        parked: bool,
        agent: Option<Arc<Connection>>,
    ) -> Self {
        Self {
            id: identity.id.clone(),
            name: request.choice.name.clone(),
            template: request.template.clone(),
            metadata: request.metadata.clone(),
            created_unix_ms: unix_ms(),
            parked,
            identity: Mutex::new(identity),
            pid: OnceLock::new(),
            paged: AtomicBool::new(false),
            handles: Mutex::new(Handles { socket: Some(socket), process: None }),
            status: watch::Sender::new(Status::Creating),
            buried: watch::Sender::new(false),
            console: Mutex::new(Console::default()),
            agent: tokio::sync::Mutex::new(agent),
            attached: Mutex::new(None),
            save: Mutex::new(None),
            saving: tokio::sync::Mutex::new(()),
            progress: watch::Sender::default(),
            ways: Ways::default(),
            received_ns: AtomicU64::new(request.received_ns),
        }
    }

    /// Where it is in its life.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Whether it is not dead.
    pub fn is_alive(&self) -> bool {
        !matches!(*self.status.borrow(), Status::Died(_))
    }

    /// Whether it was made while its image was incomplete.
    pub fn is_paged(&self) -> bool {
        self.paged.load(Ordering::Relaxed)
    }

    /// Its process, once it is known.
    pub fn pid(&self) -> Option<i32> {
        self.pid.get().copied()
    }

    /// Order of creation.
    pub fn generation(&self) -> u64 {
        self.identity.lock().expect("no panic under this lock").generation
    }

    /// As the API shows it.
    pub fn info(&self) -> ForkInfo {
        let identity = self.identity.lock().expect("no panic under this lock").clone();
        let (state, timings_us, death) = match self.status() {
            Status::Creating => (ForkState::Creating, None, None),
            Status::Running(timings) => (ForkState::Running, Some(timings), None),
            Status::Died(death) => (ForkState::Died, None, Some(death)),
        };
        ForkInfo {
            id: self.id.clone(),
            name: self.name.clone(),
            template: self.template.name().to_owned(),
            state,
            death,
            hostname: identity.hostname,
            machine_id: identity.machine_id,
            generation: identity.generation,
            pid: self.pid.get().copied(),
            created_unix_ms: self.created_unix_ms,
            parked: self.parked,
            network: self.attached().map(|attached| attached.show()),
            metadata: (*self.metadata).clone(),
            timings_us,
        }
    }

    /// Its side of the network, while it lives and if it has a NIC.
    pub fn attached(&self) -> Option<Arc<Attached>> {
        self.attached.lock().expect("no panic under this lock").clone()
    }

    fn attach(&self, attached: Option<Attached>) {
        *self.attached.lock().expect("no panic under this lock") = attached.map(Arc::new);
    }

    /// Last output of the guest's serial console, and how many bytes were dropped before it.
    pub fn console(&self) -> (Vec<u8>, u64) {
        self.console.lock().expect("no panic under this lock").contents()
    }

    /// Kills it, now; the first reason is kept. Reaping goes on in its own task.
    pub fn kill(&self, reason: &str, message: &str) {
        self.condemn(reason, message);
        // A process that is not known yet is killed as soon as it is.
        if let Some(process) = &self.handles().process {
            process.kill();
        }
    }

    /// Makes it count as dead, for the reason given; [`Self::kill`] is to follow.
    pub fn condemn(&self, reason: &str, message: &str) {
        self.die(Death {
            reason: reason.to_owned(),
            message: message.to_owned(),
            signal: None,
            exit_code: None,
            at_unix_ms: unix_ms(),
        });
    }

    fn handles(&self) -> MutexGuard<'_, Handles> {
        self.handles.lock().expect("no panic under this lock")
    }

    /// Joins `stream` with the guest's vsock `port`; while the fork is reset, it waits.
    pub async fn connect(
        &self,
        port: u32,
        opening: Opening,
        stream: BorrowedFd<'_>,
    ) -> Result<(), control::Error> {
        let _open = self.ways.gate.read().await;
        self.send(&ToFork::Connect { port, opening }, &[stream]).await
    }

    /// Sends it something that it hears only while its guest runs; while the fork is reset, it waits.
    pub async fn send_running(&self, message: &ToFork, fds: &[BorrowedFd<'_>]) -> Result<(), control::Error> {
        let _open = self.ways.gate.read().await;
        self.send(message, fds).await
    }

    /// Waits until it is dead, or certain to die.
    pub async fn died(&self) {
        let mut status = self.status.subscribe();
        let _ = status.wait_for(|status| matches!(status, Status::Died(_))).await;
    }

    async fn send(&self, message: &ToFork, fds: &[BorrowedFd<'_>]) -> Result<(), control::Error> {
        let socket = self.handles().socket.clone();
        let socket = socket.ok_or(io::Error::from(io::ErrorKind::BrokenPipe))?;
        socket.send(message, fds).await
    }

    /// Waits until its process is reaped.
    pub async fn buried(&self) {
        let mut buried = self.buried.subscribe();
        let _ = buried.wait_for(|buried| *buried).await;
    }

    fn die(&self, death: Death) {
        self.status.send_if_modified(|status| {
            let alive = !matches!(status, Status::Died(_));
            if alive {
                *status = Status::Died(death);
            }
            alive
        });
    }

    /// The error for calls to it when it is dead.
    pub fn death_error(&self) -> Option<Error> {
        match &*self.status.borrow() {
            Status::Died(death) => {
                Some(Error::new(Code::ForkDied, format!("fork {} died: {}", self.id, death.message)))
            }
            Status::Creating | Status::Running(_) => None,
        }
    }

    /// Turns a failure of its agent into the reason behind it: a dead fork's agent is lost first.
    pub async fn explain(&self, error: Error) -> Error {
        const NOTICE: std::time::Duration = std::time::Duration::from_millis(300);
        let mut status = self.status.subscribe();
        let died = status.wait_for(|status| matches!(status, Status::Died(_)));
        let _ = tokio::time::timeout(NOTICE, died).await.map(|_| ());
        self.death_error().unwrap_or(error)
    }

    /// The kept connection to its agent.
    pub async fn agent(&self) -> Result<Arc<Connection>, Error> {
        let mut agent = self.agent.lock().await;
        if let Some(connection) = agent.as_ref().filter(|connection| connection.is_open()) {
            return Ok(connection.clone());
        }
        let connection = self.connect_agent().await?;
        *agent = Some(connection.clone());
        Ok(connection)
    }

    /// A connection to its agent of the caller's own.
    pub async fn connect_agent(&self) -> Result<Arc<Connection>, Error> {
        if let Some(error) = self.death_error() {
            return Err(error);
        }
        let unreachable = |cause: &dyn std::fmt::Display| {
            Error::new(Code::AgentUnreachable, format!("cannot connect to the agent of fork {}", self.id))
                .because(cause)
        };
        let (ours, theirs) = UnixStream::pair().map_err(|error| unreachable(&error))?;
        let theirs = OwnedFd::from(theirs.into_std().map_err(|error| unreachable(&error))?);
        match self.connect(rpc::PORT, Opening::Plain, theirs.as_fd()).await {
            Ok(()) => Ok(Connection::new(ours)),
            Err(error) => Err(self.explain(unreachable(&error)).await),
        }
    }

    /// Saves the machine into `directory` at its next forkpoint; `go` sends the guest there.
    pub async fn save<F>(&self, directory: &OwnedFd, generation: u64, go: F) -> Result<(), SaveError>
    where
        F: Future<Output = Result<(), Error>>,
    {
        let _one = self.saving.lock().await;
        let renewed = self.identity.lock().expect("no panic under this lock").renewed(generation);
        let mailbox =
            renewed.mailbox().map_err(|error| SaveError::Io(io::Error::other(error.to_string())))?;
        let (sender, saved) = oneshot::channel();
        *self.save.lock().expect("no panic under this lock") = Some(sender);
        *self.identity.lock().expect("no panic under this lock") = renewed;
        self.send(&ToFork::Save { mailbox }, &[directory.as_fd()]).await?;
        let saved = async {
            match saved.await {
                Ok(outcome) => outcome.map_err(SaveError::Failed),
                Err(_) => Err(SaveError::Io(io::ErrorKind::BrokenPipe.into())),
            }
        };
        tokio::try_join!(async { go.await.map_err(SaveError::Guest) }, saved).map(|_| ())
    }
}

/// Why a fork could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// Its process refused or failed.
    #[error("{}", .0.message)]
    Failed(Failure),
    /// Its control socket failed.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// It is gone.
    #[error(transparent)]
    Io(io::Error),
    /// Its guest did not go to a forkpoint.
    #[error(transparent)]
    Guest(Error),
}

/// Milliseconds since 1970.
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
