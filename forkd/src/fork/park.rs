//! Parked forks: made, rehearsed and taken back to their forkpoint before anybody asks for them.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use forkling_proto::rpc::{self, Kind};
use forkling_vmm::protocol::{Failure, FromFork, Opening, PageRun, ToFork, View};
use tokio::{
    net::UnixStream,
    time::{sleep, timeout},
};

use super::network::{NetworkChoice, wire};
use crate::{
    agent::{self, Connection, Event},
    api::types::{PoolSettings, Rehearsal},
    control::{self, Socket},
    engine::Engine,
    identity::{Choice, Identity},
    limits::PARK_TIMEOUT,
    network::{self, Address, NewNic, Nic},
    process::{Doomed, Process},
    zygote::Zygote,
};

/// The command of a rehearsal: what it warms is the way to any command.
const REHEARSED: &str = "/bin/true";

/// How long a fork is watched after its first command: what its timers touch is wanted, too, and last.
const SOME_TICKS: Duration = Duration::from_millis(100);

/// Why there is no parked fork.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its socket or process could not be had.
    #[error("the host refused")]
    Io(#[from] std::io::Error),
    /// Its control socket failed.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// It has no network.
    #[error(transparent)]
    Network(#[from] network::Error),
    /// The zygote is gone.
    #[error("the template's zygote is gone")]
    NoZygote,
    /// It said why.
    #[error("{}", .0.message)]
    Failed(Failure),
    /// Its process ended.
    #[error("its process ended")]
    Ended,
    /// Its agent failed in the rehearsal.
    #[error("the rehearsal failed")]
    Rehearsal(#[from] agent::Error),
    /// Something it should not have said.
    #[error("it sent an answer out of order; its binary is of another build")]
    Protocol,
    /// No identity could be made for the rehearsal.
    #[error("{0}")]
    Identity(String),
    /// It took too long.
    #[error("it was not parked within {} s", PARK_TIMEOUT.as_secs())]
    Late,
}

/// A fork without identity, waiting to be activated. Dropped, it is killed.
#[derive(Debug)]
pub struct Parked {
    /// Its control socket.
    pub socket: Arc<Socket>,
    process: Doomed,
    /// Of its NIC, if it has one.
    nic: Option<Nic>,
    /// The address that the NIC has, or is to have.
    address: Option<Address>,
    /// To its agent, for the first calls.
    agent: Option<Arc<Connection>>,
}

/// Pages that the guest touched in a rehearsal.
#[derive(Clone, Debug, Default)]
pub struct Touched {
    /// Read and not written.
    pub read: Vec<PageRun>,
    /// Written.
    pub write: Vec<PageRun>,
}

impl Parked {
    /// Whether its process lives.
    pub fn is_alive(&self) -> bool {
        self.process.is_alive()
    }

    /// The address that its NIC has or is to have.
    pub fn address(&self) -> Option<&Address> {
        self.address.as_ref()
    }

    /// The daemon's side of its NIC.
    pub fn nic(&self) -> Option<&Nic> {
        self.nic.as_ref()
    }

    /// Its NIC's wire and address, if it has them.
    pub fn take_network(&mut self) -> (Option<Nic>, Option<Address>) {
        (self.nic.take(), self.address.take())
    }

    /// The connection to its agent, if there is one already.
    pub fn agent(&self) -> Option<Arc<Connection>> {
        self.agent.clone()
    }

    /// Its socket and process, whose end is the caller's business from now on.
    pub fn take(self) -> (Arc<Socket>, Process) {
        (self.socket, self.process.spare())
    }
}

/// What a fork touches from its forkpoint on, each including what comes before.
#[derive(Clone, Debug, Default)]
pub struct Stages {
    /// Until its acknowledgement.
    pub acknowledge: Touched,
    /// Until its agent's first answer; as before if it has no agent.
    pub answer: Touched,
    /// Until the end of its first command; as before if it has no agent.
    pub command: Touched,
    /// Until the acknowledgement of a fork with a name of its own, which takes a longer way; nothing if it has no agent.
    pub named: Touched,
}

/// Makes a parked fork, prepared for the network that forks usually ask for. The template's image is complete. Cancelled, it
/// leaves nothing.
pub async fn park(
    engine: &Engine,
    zygote: &Zygote,
    settings: &PoolSettings,
    usual: &NetworkChoice,
) -> Result<Parked, Error> {
    let work = async {
        let parked = if settings.keep_writes {
            warm(engine, zygote, settings).await?
        } else {
            make(engine, zygote, View::Bare, false).await?
        };
        parked.admit(usual).await?;
        Ok(parked)
    };
    timeout(PARK_TIMEOUT, work).await.map_err(|_| Error::Late)?
}

/// Makes a parked fork that holds what its first use needs.
async fn warm(engine: &Engine, zygote: &Zygote, settings: &PoolSettings) -> Result<Parked, Error> {
    let mut parked = make(engine, zygote, View::Complete, settings.pre_fault).await?;
    if settings.rehearsal != Rehearsal::Off {
        parked.rehearse(engine, settings.rehearsal).await?;
        parked.rewind().await?;
        if parked.nic.is_some() {
            parked.prepare(engine).await?;
        }
        // Where nothing is left to be done at the first connection.
        if settings.rehearsal == Rehearsal::Command {
            parked.agent = Some(parked.connect().await?);
        }
    }
    Ok(parked)
}

/// What a fork touches. `agent` is whether it has one. The forks that tell it end with it.
pub async fn touched(engine: &Engine, zygote: &Zygote, agent: bool) -> Result<Stages, Error> {
    let work = async {
        let (parked, acknowledge) = acknowledged(engine, zygote, &Choice::default()).await?;
        if !agent {
            let (answer, command) = (acknowledge.clone(), acknowledge.clone());
            return Ok(Stages { acknowledge, answer, command, named: Touched::default() });
        }
        parked.connect().await?.round_trip(Kind::Ping).await?;
        let answer = parked.report().await?;
        parked.run_command().await?;
        sleep(SOME_TICKS).await;
        let command = parked.report().await?;
        drop(parked);
        let (_, named) = acknowledged(engine, zygote, &named()).await?;
        Ok(Stages { acknowledge, answer, command, named })
    };
    timeout(PARK_TIMEOUT, work).await.map_err(|_| Error::Late)?
}

/// A fork that has acknowledged an identity, and what it has touched for that.
async fn acknowledged(engine: &Engine, zygote: &Zygote, choice: &Choice) -> Result<(Parked, Touched), Error> {
    let parked = make(engine, zygote, View::Exact, false).await?;
    let touched = parked.rehearse_as(choice, engine, Rehearsal::Acknowledge).await?;
    Ok((parked, touched.ok_or(Error::Protocol)?))
}

/// Of a fork with a host name of another length than the usual: it takes a longer way through the guest's kernel.
fn named() -> Choice {
    Choice { name: Some("rehearsal".to_owned()), ..Choice::default() }
}

async fn make(engine: &Engine, zygote: &Zygote, view: View, pre_fault: bool) -> Result<Parked, Error> {
    let (socket, theirs) = control::pair()?;
    let (nic, frames, address) = match wire(engine, zygote, None).await? {
        Some(NewNic { nic, frames, address }) => (Some(nic), Some(frames), address),
        None => (None, None, None),
    };
    let spawned = zygote.spawn(theirs, frames, view, pre_fault).await?;
    let pid = spawned.await.map_err(|_| Error::NoZygote)?.map_err(Error::Failed)?;
    let process = Doomed::new(Process::adopt(pid)?);
    let parked = Parked { socket: Arc::new(socket), process, nic, address, agent: None };
    parked.until_parked().await?;
    Ok(parked)
}

impl Parked {
    /// What it says next, console output aside.
    async fn hear(&self) -> Result<FromFork, Error> {
        loop {
            match self.socket.receive::<FromFork>().await? {
                Some((FromFork::Console(_), _)) => {}
                Some((FromFork::Failed(failure), _)) => return Err(Error::Failed(failure)),
                Some((FromFork::Stopped(_), _)) | None => return Err(Error::Ended),
                Some((message, _)) => return Ok(message),
            }
        }
    }

    async fn until_parked(&self) -> Result<(), Error> {
        match self.hear().await? {
            FromFork::Parked(_) => Ok(()),
            _ => Err(Error::Protocol),
        }
    }

    /// Runs what a fork runs first, and whatever one with a name runs, under an identity that nobody keeps.
    async fn rehearse(&self, engine: &Engine, rehearsal: Rehearsal) -> Result<(), Error> {
        self.rehearse_as(&named(), engine, rehearsal).await.map(drop)
    }

    /// Runs what a fork of that choice runs first, under an identity that nobody keeps. Returns what was touched until the
    /// acknowledgement, if the fork tells.
    async fn rehearse_as(
        &self,
        choice: &Choice,
        engine: &Engine,
        rehearsal: Rehearsal,
    ) -> Result<Option<Touched>, Error> {
        let generation = engine.generation().map_err(|error| Error::Identity(error.to_string()))?;
        // What the kernel does to a new address depends on those it has, so the template's would not do.
        let network = self.nic.as_ref().map(|_| engine.network.addresses().sample());
        let identity = Identity::new(choice, generation).on(network);
        let mailbox = identity.mailbox().map_err(|error| Error::Identity(error.to_string()))?;
        self.socket
            .send(&ToFork::Activate { mailbox, advance_monotonic: false, plugged: false }, &[])
            .await?;
        let (mut touched, mut answer) = (None, self.hear().await?);
        if let FromFork::WorkingSet { read, write } = answer {
            touched = Some(Touched { read, write });
            answer = self.hear().await?;
        }
        match answer {
            FromFork::Acknowledged { generation, nonce, .. }
                if (generation, nonce) == (identity.generation, identity.nonce) => {}
            _ => return Err(Error::Protocol),
        }
        if rehearsal == Rehearsal::Command {
            self.run_command().await?;
        }
        Ok(touched)
    }

    /// A new connection to its agent.
    async fn connect(&self) -> Result<Arc<Connection>, Error> {
        let (ours, theirs) = UnixStream::pair()?;
        let theirs = OwnedFd::from(theirs.into_std()?);
        self.socket
            .send(&ToFork::Connect { port: rpc::PORT, opening: Opening::Plain }, &[theirs.as_fd()])
            .await?;
        Ok(Connection::new(ours))
    }

    /// What it has touched until now.
    async fn report(&self) -> Result<Touched, Error> {
        self.socket.send(&ToFork::Report, &[]).await?;
        match self.hear().await? {
            FromFork::WorkingSet { read, write } => Ok(Touched { read, write }),
            _ => Err(Error::Protocol),
        }
    }

    async fn run_command(&self) -> Result<(), Error> {
        let exec = rpc::Exec {
            argv: vec![REHEARSED.to_owned()],
            env: Vec::new(),
            cwd: None,
            user: None,
            timeout_ms: 0,
        };
        let payload = postcard::to_allocvec(&exec).expect("plain data is encoded");
        let connection = self.connect().await?;
        let mut call = connection.call(Kind::Exec, &payload)?;
        call.input().close()?;
        loop {
            match call.next().await {
                Ok(Event::Started(_) | Event::Stdout(_) | Event::Stderr(_)) => {}
                // A root without the command: the way to the agent is warm all the same.
                Ok(Event::Exit(_)) | Err(agent::Error::Refused(_)) => return Ok(()),
                Ok(Event::Pong) => return Err(agent::Error::Malformed("answer to a command").into()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Gives the NIC its address, which takes longer than all the rest of an activation.
    async fn prepare(&mut self, engine: &Engine) -> Result<(), Error> {
        let failed = |error: &dyn std::fmt::Display| Error::Identity(error.to_string());
        let address = match self.address.take() {
            Some(address) => address,
            None => engine.network.addresses().any().map_err(|error| failed(&error))?,
        };
        let identity = Identity::new(&Choice::default(), 0).on(Some(address.network()));
        let mailbox = identity.preparation().map_err(|error| failed(&error))?;
        self.socket.send(&ToFork::Prepare { mailbox }, &[]).await?;
        self.address = Some(address);
        self.until_parked().await
    }

    /// Has its NIC's rules made, as far as they can be before the fork has an identity.
    async fn admit(&self, usual: &NetworkChoice) -> Result<(), Error> {
        let (Some(nic), Some(address)) = (&self.nic, &self.address) else { return Ok(()) };
        let nobody = Identity::new(&Choice::default(), 0);
        Ok(nic.admit(|| usual.bound(&nobody, None, address)).await?)
    }

    async fn rewind(&self) -> Result<(), Error> {
        self.socket.send(&ToFork::Rewind { keep_writes: true }, &[]).await?;
        self.until_parked().await
    }
}
