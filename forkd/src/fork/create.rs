//! Making a fork: everything between a request and the guest's acknowledgement.

use std::{collections::BTreeMap, sync::Arc};

use forkling_vmm::protocol::ToFork;
use tokio::time::{Instant, timeout_at};

use super::{Fork, Status, supervise::Supervisor};
use crate::{
    api::error::{Code, Error, chain},
    control,
    engine::Engine,
    identity::{Choice, Identity},
    template::Template,
};

/// One fork to make.
#[derive(Clone, Debug)]
pub struct Request {
    /// Of what.
    pub template: Arc<Template>,
    /// The caller's part of its identity.
    pub choice: Choice,
    /// Kept with it.
    pub metadata: Arc<BTreeMap<String, String>>,
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
pub async fn create(engine: &Arc<Engine>, request: Request) -> Result<Arc<Fork>, Error> {
    let late = || Error::new(Code::ForkTimeout, "the fork was not made in the time given");
    let deadline = request.deadline;
    let (unclaimed, outcome) = timeout_at(deadline, begin(engine, request)).await.map_err(|_| late())??;
    let fork = unclaimed.0.clone();
    match timeout_at(deadline, outcome).await {
        Ok(Ok(Ok(()))) => Ok(fork),
        Ok(Ok(Err(error))) => Err(error),
        Ok(Err(_)) => Err(Error::new(Code::Internal, "the fork's task ended without a word")),
        Err(_) => {
            fork.kill("timeout", "it did not acknowledge in the time given");
            Err(late())
        }
    }
}

type Outcome = tokio::sync::oneshot::Receiver<Result<(), Error>>;

/// Sends all that the fork needs, in one go, and leaves it to its supervisor.
async fn begin(engine: &Arc<Engine>, request: Request) -> Result<(Unclaimed, Outcome), Error> {
    let loaded = request.template.ready(engine).await?;
    let permit = engine.spawns.clone().acquire_owned().await;
    let permit = permit.map_err(|_| Error::new(Code::ShuttingDown, "the daemon is ending"))?;
    let generation = engine.generation()?;
    let identity = Identity::new(&request.choice, generation);
    let mailbox = identity.mailbox().map_err(|error| Error::new(Code::EnvironmentTooLarge, error.to_string()))?;
    let failed = |error: &control::Error| {
        Error::new(Code::ForkFailed, "cannot reach the template's zygote").because(chain(error))
    };
    let (socket, theirs) = control::pair().map_err(|error| failed(&error.into()))?;
    let socket = Arc::new(socket);
    let fork = Arc::new(Fork::new(identity, socket.clone(), &request));
    engine.registry.insert_fork(&fork, engine.max_forks)?;
    // From here on the registry knows it, so every way out goes through the supervisor or kills it.
    let unclaimed = Unclaimed(fork.clone());
    let lazy = loaded.is_lazy();
    let spawned = match loaded.zygote.spawn(theirs, lazy).await {
        Ok(spawned) => spawned,
        Err(error) => {
            fork.kill("failed", "the template's zygote is gone");
            engine.registry.fork_died(&fork);
            return Err(failed(&error));
        }
    };
    let activate = ToFork::Activate { mailbox, advance_monotonic: false };
    // The fork reads it when it is ready; a fork that is never made is reported by the zygote.
    let sent = socket.send(&activate, &[]).await;
    let (supervisor, outcome) = Supervisor::new(engine.clone(), fork, socket, permit, request.received_ns);
    tokio::spawn(supervisor.run(spawned));
    if let Err(error) = sent {
        tracing::debug!(%error, "activation was not sent");
    }
    if lazy {
        loaded.complete_in_background(engine, &request.template);
    }
    Ok((unclaimed, outcome))
}
