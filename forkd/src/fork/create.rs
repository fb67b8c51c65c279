//! Making a fork: everything between a request and the guest's acknowledgement.

use std::{collections::BTreeMap, sync::Arc};

use forkling_vmm::protocol::ToFork;
use tokio::{
    sync::oneshot,
    time::{Instant, timeout_at},
};

use super::{
    Fork, Parked, Status,
    make::make,
    network::{Attached, NetworkChoice, not_had, unavailable},
    supervise::Supervisor,
};
use crate::{
    api::{
        error::{Code, Error},
        types::PoolUse,
    },
    control::Socket,
    engine::Engine,
    identity::{Choice, Identity},
    network::{Address, Nic},
    template::Template,
};

/// One fork to make.
#[derive(Clone, Debug)]
pub struct Request {
    /// Of what.
    pub template: Arc<Template>,
    /// The caller's part of its identity.
    pub choice: Choice,
    /// Its network.
    pub network: Arc<NetworkChoice>,
    /// Kept with it.
    pub metadata: Arc<BTreeMap<String, String>>,
    /// Whether a parked fork may serve.
    pub pool: PoolUse,
    /// When the caller gives up.
    pub deadline: Instant,
    /// When the request was read; CLOCK_MONOTONIC in nanoseconds.
    pub received_ns: u64,
}

/// Kills a fork that nobody waits for any more.
pub(super) struct Unclaimed(pub(super) Arc<Fork>);

impl Drop for Unclaimed {
    fn drop(&mut self) {
        if matches!(self.0.status(), Status::Creating) {
            self.0.kill("killed", "the caller went away before the fork was made");
        }
    }
}

/// Makes a fork and waits for its acknowledgement. Cancelled, it leaves nothing.
pub async fn create(engine: &Arc<Engine>, request: Request) -> Result<Arc<Fork>, Error> {
    let outcome = match attempt(engine, &request, true).await {
        // What was made ahead may have been killed while it waited, or just now; that is nothing to the caller.
        Err(Failed { error, ahead: true }) if error.code == Code::ForkFailed => {
            attempt(engine, &request, false).await
        }
        outcome => outcome,
    };
    outcome.map_err(|failed| failed.error)
}

/// Why there is no fork, and whether it was to be one whose process was there before it, parked or an embryo.
pub(super) struct Failed {
    pub(super) error: Error,
    pub(super) ahead: bool,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self { error, ahead: false }
    }
}

/// A fork that its supervisor has.
pub(super) struct Begun {
    pub(super) unclaimed: Unclaimed,
    /// What becomes of it.
    pub(super) outcome: oneshot::Receiver<Result<(), Error>>,
    /// Whether its process was there before it.
    pub(super) ahead: bool,
}

async fn attempt(engine: &Arc<Engine>, request: &Request, ahead: bool) -> Result<Arc<Fork>, Failed> {
    let late = || Error::new(Code::ForkTimeout, "the fork was not made in the time given");
    let deadline = request.deadline;
    let begun = timeout_at(deadline, begin(engine, request, ahead)).await.map_err(|_| late())??;
    let Begun { unclaimed, outcome, ahead } = begun;
    let fork = unclaimed.0.clone();
    match timeout_at(deadline, outcome).await {
        Ok(Ok(Ok(()))) => Ok(fork),
        // A snapshot found damaged takes the zygote with it; the damage is the reason.
        Ok(Ok(Err(error))) => Err(Failed { error: fork.template.damage().unwrap_or(error), ahead }),
        Ok(Err(_)) => Err(Error::new(Code::Internal, "the fork's task ended without a word").into()),
        Err(_) => {
            fork.kill("timeout", "it did not acknowledge in the time given");
            Err(late().into())
        }
    }
}

/// Sends all that the fork needs, in one go, and leaves it to its supervisor. `ahead` is whether a process will do that is there.
async fn begin(engine: &Arc<Engine>, request: &Request, ahead: bool) -> Result<Begun, Failed> {
    let loaded = request.template.ready(engine).await?;
    // Parked forks have their addresses already.
    if ahead && request.pool == PoolUse::Use && request.network.ipv4.is_none() {
        while let Some(parked) = request.template.pool().claim() {
            if let Some(begun) = activate(engine, request, parked).await? {
                return Ok(begun);
            }
        }
    }
    make(engine, request, &loaded, ahead).await
}

/// A fork that the registry knows, and what it needs to run.
pub(super) struct Entered {
    pub(super) unclaimed: Unclaimed,
    pub(super) activate: ToFork,
}

impl Entered {
    /// Has its NIC's rules made, if it has a NIC and they are not made yet.
    pub(super) async fn admit(
        &self,
        request: &Request,
        nic: Option<&Nic>,
        address: Option<&Address>,
    ) -> Result<(), Error> {
        let Some((nic, address)) = nic.zip(address) else { return Ok(()) };
        let name = request.choice.name.as_deref();
        let bound = || {
            let identity = self.unclaimed.0.identity.lock().expect("no panic under this lock");
            request.network.bound(&identity, name, address)
        };
        let admitted = nic.admit(bound).await;
        admitted.map_err(|error| unavailable(&error))
    }

    /// Gives its NIC's wire and address to the fork, if it has one.
    pub(super) fn attach(&self, request: &Request, network: (Option<Nic>, Option<Address>)) {
        let attached = network.0.zip(network.1);
        let attached = attached.map(|(nic, address)| Attached::new(nic, address, request.network.clone()));
        self.unclaimed.0.attach(attached);
    }
}

/// A new fork's record, entered, and what activates it.
pub(super) fn enter(
    engine: &Engine,
    request: &Request,
    socket: &Arc<Socket>,
    address: Option<&Address>,
    parked: Option<&Parked>,
) -> Result<Entered, Error> {
    let identity = Identity::new(&request.choice, engine.generation()?).on(address.map(Address::network));
    let mailbox =
        identity.mailbox().map_err(|error| Error::new(Code::EnvironmentTooLarge, error.to_string()))?;
    let agent = parked.and_then(Parked::agent);
    let fork = Arc::new(Fork::new(identity, socket.clone(), request, parked.is_some(), agent));
    engine.registry.insert_fork(&fork, engine.max_forks)?;
    // From here on the registry knows it, so every way out goes through the supervisor or kills it.
    let activate = ToFork::Activate { mailbox, advance_monotonic: false, plugged: true };
    Ok(Entered { unclaimed: Unclaimed(fork), activate })
}

/// Any address for a fork with a NIC.
pub(super) fn address(engine: &Engine, request: &Request) -> Result<Option<Address>, Error> {
    if !request.template.record.spec.has_nic() {
        return Ok(None);
    }
    engine.network.addresses().any().map(Some).map_err(|error| not_had(&error))
}

/// Gives a parked fork its identity. `None`: it had died meanwhile.
async fn activate(
    engine: &Arc<Engine>,
    request: &Request,
    mut parked: Parked,
) -> Result<Option<Begun>, Error> {
    let entered = if parked.address().is_some() {
        enter(engine, request, &parked.socket, parked.address(), Some(&parked)).map(|entered| (entered, None))
    } else {
        let given = address(engine, request);
        given.and_then(|given| {
            Ok((enter(engine, request, &parked.socket, given.as_ref(), Some(&parked))?, given))
        })
    };
    let (entered, given) = match entered {
        Ok(entered) => entered,
        Err(error) => {
            request.template.pool().give_back(parked);
            return Err(error);
        }
    };
    entered.admit(request, parked.nic(), parked.address().or(given.as_ref())).await?;
    if let Err(error) = parked.socket.send(&entered.activate, &[]).await {
        let unclaimed = entered.unclaimed;
        tracing::debug!(%error, "a parked fork had died");
        unclaimed.0.kill("failed", "it had died in the pool; another one took its place");
        engine.registry.fork_died(&unclaimed.0);
        return Ok(None);
    }
    let (nic, prepared) = parked.take_network();
    entered.attach(request, (nic, prepared.or(given)));
    let (socket, process) = parked.take();
    let Entered { unclaimed, .. } = entered;
    let fork = unclaimed.0.clone();
    let (supervisor, outcome) = Supervisor::new(engine.clone(), fork, socket, None);
    tokio::spawn(supervisor.run_made(process));
    Ok(Some(Begun { unclaimed, outcome, ahead: true }))
}
