//! Making a fork from nothing: of the template's embryo, or of a new process.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use forkling_vmm::protocol::{ToFork, View};

use super::{
    create::{Begun, Failed, Request, address, enter},
    network::{unavailable, wire},
    supervise::Supervisor,
};
use crate::{
    api::error::{Code, Error, chain},
    control::{self, Socket},
    engine::Engine,
    network::NewNic,
    process::Process,
    template::Loaded,
    zygote::{Spawned, Zygote, embryo::Embryo},
};

/// Where the process of a fork comes from.
enum Origin {
    /// It is there.
    Embryo(Embryo),
    /// The zygote makes it, with this end of its control socket.
    Zygote(OwnedFd),
}

/// The process of a fork, as its supervisor comes to know it.
enum Born {
    Embryo(Process),
    Spawned(Spawned),
}

/// Makes a fork from nothing. `ahead` is whether an embryo will do.
pub async fn make(
    engine: &Arc<Engine>,
    request: &Request,
    loaded: &Arc<Loaded>,
    ahead: bool,
) -> Result<Begun, Failed> {
    let permit = engine.spawns.clone().acquire_owned().await;
    let permit = permit.map_err(|_| Error::new(Code::ShuttingDown, "the daemon is ending"))?;
    let (nic, frames, given) = match wire(engine, &loaded.zygote, request.network.ipv4).await {
        Ok(Some(NewNic { nic, frames, address })) => (Some(nic), Some(frames), address),
        Ok(None) => (None, None, None),
        Err(error) => return Err(unavailable(&error).into()),
    };
    let address = if given.is_some() { given } else { address(engine, request)? };
    let lazy = loaded.is_lazy();
    // Whoever waits for it would wait for what is mapped ahead, used or not.
    let view = if lazy { View::Lazy } else { View::Complete };
    let (socket, origin) = Origin::of(&loaded.zygote, ahead && !lazy)?;
    let ahead = matches!(origin, Origin::Embryo(_));
    let entered = match enter(engine, request, &socket, address.as_ref(), None) {
        Ok(entered) => entered,
        Err(error) => {
            origin.give_back(&loaded.zygote);
            return Err(error.into());
        }
    };
    let fork = entered.unclaimed.0.clone();
    entered.admit(request, nic.as_ref(), address.as_ref()).await?;
    entered.attach(request, (nic, address));
    let born = match origin.begin(&loaded.zygote, &socket, frames, view).await {
        Ok(born) => born,
        Err(error) => {
            fork.kill("failed", "its process could not be reached");
            engine.registry.fork_died(&fork);
            return Err(Failed { error: unreachable(&error), ahead });
        }
    };
    // The fork reads it when it is ready; a fork that is never made is reported by the zygote.
    let sent = socket.send(&entered.activate, &[]).await;
    let (supervisor, outcome) = Supervisor::new(engine.clone(), fork, socket, Some(permit));
    match born {
        Born::Embryo(process) => tokio::spawn(supervisor.run_made(process)),
        Born::Spawned(spawned) => tokio::spawn(supervisor.run(spawned)),
    };
    if let Err(error) = sent {
        tracing::debug!(%error, "activation was not sent");
    }
    if lazy {
        loaded.complete_in_background(engine, &request.template);
    }
    Ok(Begun { unclaimed: entered.unclaimed, outcome, ahead })
}

fn unreachable(error: &control::Error) -> Error {
    Error::new(Code::ForkFailed, "cannot reach the fork's process or its template's zygote")
        .because(chain(error))
}

impl Origin {
    /// The embryo, if it will do and there is one. And our end of the control socket.
    fn of(zygote: &Zygote, ahead: bool) -> Result<(Arc<Socket>, Self), Error> {
        if ahead && let Some(embryo) = zygote.nest().take() {
            return Ok((embryo.socket.clone(), Self::Embryo(embryo)));
        }
        let (socket, theirs) = control::pair().map_err(|error| unreachable(&error.into()))?;
        Ok((Arc::new(socket), Self::Zygote(theirs)))
    }

    async fn begin(
        self,
        zygote: &Zygote,
        socket: &Socket,
        frames: Option<OwnedFd>,
        view: View,
    ) -> Result<Born, control::Error> {
        match self {
            Self::Embryo(embryo) => {
                let wire: Vec<_> = frames.iter().map(AsFd::as_fd).collect();
                socket.send(&ToFork::Begin, &wire).await?;
                Ok(Born::Embryo(embryo.into_process()))
            }
            Self::Zygote(theirs) => zygote.spawn(theirs, frames, view, false).await.map(Born::Spawned),
        }
    }

    /// It was not needed.
    fn give_back(self, zygote: &Zygote) {
        if let Self::Embryo(embryo) = self {
            zygote.nest().put(embryo);
        }
    }
}
