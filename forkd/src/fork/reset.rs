//! Taking a running fork back to its template's forkpoint, in place.

use std::{
    os::fd::BorrowedFd,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use forkling_vmm::protocol::ToFork;
use tokio::time::timeout;

use super::{Fork, Status, monotonic_ns};
use crate::{
    api::error::{Code, Error, chain},
    api::types::{NextIdentity, ResetFork},
    engine::Engine,
};

/// What a fork has reached, for whoever waits for it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Progress {
    /// How often it was parked.
    pub parked: u64,
    /// Generation it acknowledged last.
    pub acknowledged: u64,
}

impl Fork {
    /// Resets the fork: memory, processors and devices are the template's again, connections into it are cut, and it
    /// acknowledges anew, with a new generation and fresh randomness. Calls to its agent made meanwhile wait. A fork that
    /// cannot be reset is killed.
    pub async fn reset(
        self: &Arc<Self>,
        engine: &Engine,
        request: &ResetFork,
        within: Duration,
    ) -> Result<(), Error> {
        let _no_save = self.saving.lock().await;
        let mut agent = self.agent.lock().await;
        agent.take();
        // A fork that is rewound hears nothing but its activation.
        let _closed = self.ways.gate.write().await;
        let received = monotonic_ns();
        match timeout(within, self.go_back(engine, request, received)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                self.kill("failed", &format!("it could not be reset: {}", error.message));
                Err(self.explain(error).await)
            }
            Err(_) => {
                self.kill("timeout", "it did not come back from a reset in the time given");
                Err(Error::new(
                    Code::ForkTimeout,
                    format!("fork {} was not reset in the time given", self.id),
                ))
            }
        }
    }

    async fn go_back(&self, engine: &Engine, request: &ResetFork, received: u64) -> Result<(), Error> {
        let before = self.progress.borrow().parked;
        self.tell(&ToFork::Rewind { keep_writes: request.keep_writes }).await?;
        self.until(|progress| progress.parked > before).await?;
        if let Some(attached) = self.attached() {
            attached.reset().await?;
        }
        self.ways.rewound();
        let generation = engine.generation()?;
        let mailbox = {
            let mut identity = self.identity.lock().expect("no panic under this lock");
            *identity = match request.identity {
                NextIdentity::Same => identity.renewed(generation),
                NextIdentity::New => identity.renewed(generation).with_new_machine_id(),
            };
            identity.mailbox()
        };
        let mailbox = mailbox.map_err(|error| Error::new(Code::EnvironmentTooLarge, error.to_string()))?;
        self.received_ns.store(received, Ordering::Relaxed);
        self.tell(&ToFork::Activate { mailbox, advance_monotonic: false, plugged: true }).await?;
        if self.ways.offers_ports() {
            self.tell(&ToFork::OfferPorts).await?;
        }
        self.until(|progress| progress.acknowledged == generation).await
    }

    async fn tell(&self, message: &ToFork) -> Result<(), Error> {
        const NO_FDS: &[BorrowedFd<'_>] = &[];
        self.send(message, NO_FDS).await.map_err(|error| {
            Error::new(Code::ForkFailed, format!("the process of fork {} cannot be reached", self.id))
                .because(chain(&error))
        })
    }

    async fn until(&self, reached: impl Fn(&Progress) -> bool) -> Result<(), Error> {
        let (mut progress, mut status) = (self.progress.subscribe(), self.status.subscribe());
        tokio::select! {
            biased;
            _ = status.wait_for(|status| matches!(status, Status::Died(_))) => {
                Err(self.death_error().expect("it is dead"))
            }
            _ = progress.wait_for(reached) => Ok(()),
        }
    }
}
