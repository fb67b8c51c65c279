//! Making a fork: everything between a request and the guest's acknowledgement.

use std::{collections::BTreeMap, sync::Arc};

use forkling_vmm::protocol::{ToFork, View};
use tokio::time::{Instant, timeout_at};

use super::{
    Fork, Parked, Status,
    network::{Attached, NetworkChoice, not_had, unavailable, wire},
    supervise::Supervisor,
};
use crate::{
    api::{
        error::{Code, Error, chain},
        types::PoolUse,
    },
    control::{self, Socket},
    engine::Engine,
    identity::{Choice, Identity},
    network::{Address, NewNic, Nic},
    template::{Loaded, Template},
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
struct Unclaimed(Arc<Fork>);

impl Drop for Unclaimed {
    fn drop(&mut self) {
        if matches!(self.0.status(), Status::Creating) {
            self.0.kill("killed", "the caller went away before the fork was made");
        }
    }
}

/// Makes a fork and waits for its acknowledgement. Cancelled, it leaves nothing.
pub async fn create(engine: &Arc<Engine>, mut request: Request) -> Result<Arc<Fork>, Error> {
    loop {
        match attempt(engine, &request).await {
            // A parked fork may have been killed in the pool, or just now; that is nothing to the caller.
            Err(Failed { error, parked: true }) if error.code == Code::ForkFailed => {
                request.pool = PoolUse::Bypass;
            }
            outcome => return outcome.map_err(|failed| failed.error),
        }
    }
}

/// Why there is no fork, and whether it was to be a parked one.
struct Failed {
    error: Error,
    parked: bool,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self { error, parked: false }
    }
}

async fn attempt(engine: &Arc<Engine>, request: &Request) -> Result<Arc<Fork>, Failed> {
    let late = || Error::new(Code::ForkTimeout, "the fork was not made in the time given");
    let deadline = request.deadline;
    let (unclaimed, outcome) = timeout_at(deadline, begin(engine, request)).await.map_err(|_| late())??;
    let fork = unclaimed.0.clone();
    match timeout_at(deadline, outcome).await {
        Ok(Ok(Ok(()))) => Ok(fork),
        // A snapshot found damaged takes the zygote with it; the damage is the reason.
        Ok(Ok(Err(error))) => {
            Err(Failed { error: fork.template.damage().unwrap_or(error), parked: fork.parked })
        }
        Ok(Err(_)) => Err(Error::new(Code::Internal, "the fork's task ended without a word").into()),
        Err(_) => {
            fork.kill("timeout", "it did not acknowledge in the time given");
            Err(late().into())
        }
    }
}

type Outcome = tokio::sync::oneshot::Receiver<Result<(), Error>>;

/// Sends all that the fork needs, in one go, and leaves it to its supervisor.
async fn begin(engine: &Arc<Engine>, request: &Request) -> Result<(Unclaimed, Outcome), Error> {
    let loaded = request.template.ready(engine).await?;
    // Parked forks have their addresses already.
    if request.pool == PoolUse::Use && request.network.ipv4.is_none() {
        while let Some(parked) = request.template.pool().claim() {
            if let Some(begun) = activate(engine, request, parked).await? {
                return Ok(begun);
            }
        }
    }
    make(engine, request, &loaded).await
}

/// A fork that the registry knows, and what it needs to run.
struct Entered {
    unclaimed: Unclaimed,
    activate: ToFork,
}

impl Entered {
    /// Has its NIC's rules made, if it has a NIC and they are not made yet.
    async fn admit(
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
    fn attach(&self, request: &Request, network: (Option<Nic>, Option<Address>)) {
        let attached = network.0.zip(network.1);
        let attached = attached.map(|(nic, address)| Attached::new(nic, address, request.network.clone()));
        self.unclaimed.0.attach(attached);
    }
}

/// A new fork's record, entered, and what activates it.
fn enter(
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
fn address(engine: &Engine, request: &Request) -> Result<Option<Address>, Error> {
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
) -> Result<Option<(Unclaimed, Outcome)>, Error> {
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
    tokio::spawn(supervisor.run_parked(process));
    Ok(Some((unclaimed, outcome)))
}

/// Makes a fork from nothing.
async fn make(
    engine: &Arc<Engine>,
    request: &Request,
    loaded: &Arc<Loaded>,
) -> Result<(Unclaimed, Outcome), Error> {
    let permit = engine.spawns.clone().acquire_owned().await;
    let permit = permit.map_err(|_| Error::new(Code::ShuttingDown, "the daemon is ending"))?;
    let failed = |error: &control::Error| {
        Error::new(Code::ForkFailed, "cannot reach the template's zygote").because(chain(error))
    };
    let (socket, theirs) = control::pair().map_err(|error| failed(&error.into()))?;
    let socket = Arc::new(socket);
    let chosen = request.network.ipv4;
    let (nic, frames, given) = match wire(engine, &loaded.zygote, chosen).await {
        Ok(Some(NewNic { nic, frames, address })) => (Some(nic), Some(frames), address),
        Ok(None) => (None, None, None),
        Err(error) => return Err(unavailable(&error)),
    };
    let address = if given.is_some() { given } else { address(engine, request)? };
    let entered = enter(engine, request, &socket, address.as_ref(), None)?;
    let fork = entered.unclaimed.0.clone();
    entered.admit(request, nic.as_ref(), address.as_ref()).await?;
    entered.attach(request, (nic, address));
    let Entered { unclaimed, activate, .. } = entered;
    let lazy = loaded.is_lazy();
    // Whoever waits for it would wait for what is mapped ahead, used or not.
    let view = if lazy { View::Lazy } else { View::Complete };
    let spawned = match loaded.zygote.spawn(theirs, frames, view, false).await {
        Ok(spawned) => spawned,
        Err(error) => {
            fork.kill("failed", "the template's zygote is gone");
            engine.registry.fork_died(&fork);
            return Err(failed(&error));
        }
    };
    // The fork reads it when it is ready; a fork that is never made is reported by the zygote.
    let sent = socket.send(&activate, &[]).await;
    let (supervisor, outcome) = Supervisor::new(engine.clone(), fork, socket, Some(permit));
    tokio::spawn(supervisor.run(spawned));
    if let Err(error) = sent {
        tracing::debug!(%error, "activation was not sent");
    }
    if lazy {
        loaded.complete_in_background(engine, &request.template);
    }
    Ok((unclaimed, outcome))
}
