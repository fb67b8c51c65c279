//! The forkpoint: stop, be forked, take the new identity, acknowledge.

use std::io;
use std::time::{Duration, Instant};

use forkling_proto::mailbox::{self, Header};
use forkling_proto::network::Network;

use crate::command::Environment;
use crate::failure::{chain, give_up};
use crate::identity::{self, Applier};
use crate::quiet::{self, Quiet};
use crate::reap::Reaper;
use crate::run::{self, Role};
use crate::sys::hypercall::Port;
use crate::sys::mailbox::Mailbox;
use crate::waiters::Waiters;

/// How long one on-fork hook may take.
const HOOK_LIMIT: Duration = Duration::from_secs(30);

/// Why the guest did not stop; it is as it was before.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// Other programs could not be kept from running.
    #[error("the guest cannot be made quiet for a forkpoint")]
    Quiet(#[from] quiet::Error),
    /// Files that identity is written to could not be opened.
    #[error("identity could not be applied after a forkpoint")]
    Identity(#[from] identity::Error),
    /// The waiting programs could not be taken in.
    #[error("cannot accept on the forkpoint socket")]
    Waiters(#[source] io::Error),
    /// The hypercall port is not permitted.
    #[error("cannot use the hypercall port")]
    Port(#[source] io::Error),
}

/// Why a fork cannot be served. Nothing may be done in it any more.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host left no identity.
    #[error(transparent)]
    Mailbox(#[from] mailbox::Error),
    /// The identity was not applied.
    #[error("cannot apply the fork's identity")]
    Identity(#[from] identity::Error),
    /// A hook failed.
    #[error(transparent)]
    Hook(#[from] run::Error),
    /// The hypercall port is not permitted.
    #[error("cannot use the hypercall port")]
    Port(#[source] io::Error),
}

/// What a forkpoint needs, made before the first.
#[derive(Debug)]
pub struct Forkpoint {
    mailbox: Mailbox,
    waiters: Waiters,
    hooks: Vec<Vec<String>>,
    /// Environment of the template, without any fork's own.
    template: Environment,
    /// The guest's place in the network since the last forkpoint.
    network: Option<Network>,
    /// What applied the last identity. To close and unmap it would keep a fork's first request waiting.
    used: Option<Applier>,
}

/// The guest is quiet, everything is open; only the hypercall is left.
#[derive(Debug)]
pub struct Prepared {
    applier: Applier,
    port: Port,
    quiet: Quiet,
}

impl Forkpoint {
    /// Allocates the mailbox. `hooks` run in every fork.
    pub fn new(waiters: Waiters, hooks: Vec<Vec<String>>, template: Environment) -> io::Result<Self> {
        Ok(Self { mailbox: Mailbox::new()?, waiters, hooks, template, network: None, used: None })
    }

    /// Makes the guest ready to stop.
    pub fn prepare(&mut self) -> Result<Prepared, PrepareError> {
        rustix::fs::sync();
        self.used = None;
        let applier = Applier::open(self.network)?;
        let quiet = Quiet::begin()?;
        self.waiters.gather().map_err(PrepareError::Waiters)?;
        let port = Port::open().map_err(PrepareError::Port)?;
        Ok(Prepared { applier, port, quiet })
    }

    /// Stops at the forkpoint. Returns in every fork, with its identity applied and acknowledged and its environment
    /// in `environment`. A fork that cannot be served does not return: it ends while nothing else runs in it, before
    /// anyone could notice a closed socket or draw a random number.
    pub fn pass(&mut self, prepared: Prepared, reaper: &mut Reaper, environment: &mut Environment) {
        let Prepared { mut applier, port, quiet } = prepared;
        self.mailbox.clear();
        port.forkpoint(&mut self.mailbox);
        while self.prepares(&mut applier).unwrap_or_else(|error| give_up(&chain(&error))) {
            port.forkpoint(&mut self.mailbox);
        }
        let resumed = Instant::now();
        let header =
            self.adopt(&mut applier, resumed, environment).unwrap_or_else(|error| give_up(&chain(&error)));
        let port = if self.hooks.is_empty() {
            port
        } else {
            // Hooks are programs and may need others; none may inherit the port.
            drop(port);
            drop(quiet);
            self.run_hooks(reaper, environment).unwrap_or_else(|error| give_up(&chain(&error)))
        };
        self.waiters.release(header.generation);
        self.used = Some(applier);
        port.acknowledge(header.generation, header.nonce);
        // Before `quiet` ends, so that no program starts another one while the port is held.
        drop(port);
    }

    /// Whether the mailbox asks for no more than to prepare for the identity that follows, which is then done.
    fn prepares(&mut self, applier: &mut Applier) -> Result<bool, Error> {
        let (header, identity) = mailbox::decode(self.mailbox.bytes())?;
        if header.prepare {
            self.mailbox.clear_filled();
            applier.prepare(&identity)?;
            self.network = identity.network;
        }
        Ok(header.prepare)
    }

    /// Takes on the identity in the mailbox.
    fn adopt(
        &mut self,
        applier: &mut Applier,
        resumed: Instant,
        environment: &mut Environment,
    ) -> Result<Header, Error> {
        let decoded = mailbox::decode(self.mailbox.bytes());
        self.mailbox.clear_filled();
        let (header, identity) = decoded?;
        applier.apply(&header, &identity, resumed)?;
        self.network = identity.network;
        environment.clone_from(&self.template);
        environment.extend(identity.env);
        Ok(header)
    }

    fn run_hooks(&self, reaper: &mut Reaper, environment: &Environment) -> Result<Port, Error> {
        for hook in &self.hooks {
            let deadline = Instant::now() + HOOK_LIMIT;
            run::to_end(Role::Hook, hook, environment, reaper, deadline)?;
        }
        Port::open().map_err(Error::Port)
    }
}
