//! The task that owns a fork from its making to its end.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, atomic::Ordering},
};

use forkling_vmm::protocol::{Failure, FailureKind, FromFork, Stamps, StopReason};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::{Fork, Handles, MEMORY, SNAPSHOT, Status, timings, unix_ms};
use crate::{
    api::{
        error::{Code, Error},
        types::Death,
    },
    control::Socket,
    engine::Engine,
    limits::EXIT_GRACE,
    process::{Exit, Process},
    vsock,
    zygote::Spawned,
};

/// What a fork said before it went.
enum LastWords {
    Failed(Failure),
    Stopped(StopReason),
}

/// Owner of one fork.
pub struct Supervisor {
    engine: Arc<Engine>,
    fork: Arc<Fork>,
    socket: Arc<Socket>,
    permit: Option<OwnedSemaphorePermit>,
    outcome: Option<oneshot::Sender<Result<(), Error>>>,
    last_words: Option<LastWords>,
}

impl Supervisor {
    /// And where the outcome of the making will be told.
    pub fn new(
        engine: Arc<Engine>,
        fork: Arc<Fork>,
        socket: Arc<Socket>,
        permit: Option<OwnedSemaphorePermit>,
    ) -> (Self, oneshot::Receiver<Result<(), Error>>) {
        let (sender, outcome) = oneshot::channel();
        (Self { engine, fork, socket, permit, outcome: Some(sender), last_words: None }, outcome)
    }

    /// Watches the fork until its process is reaped.
    pub async fn run(mut self, spawned: Spawned) {
        match spawned.await {
            Ok(Ok(pid)) => match Process::adopt(pid) {
                Ok(process) => self.watch(Arc::new(process)).await,
                Err(error) => self.never_lived(Failure {
                    kind: FailureKind::Host,
                    message: format!("process {pid} cannot be watched: {error}"),
                }),
            },
            Ok(Err(failure)) => self.never_lived(failure),
            Err(_) => self.never_lived(Failure {
                kind: FailureKind::Host,
                message: "the template's zygote is gone".to_owned(),
            }),
        }
        self.settle().await;
    }

    /// Watches a fork whose process was there before it, out of the pool or of an embryo, until it is reaped.
    pub async fn run_made(mut self, process: Process) {
        self.watch(Arc::new(process)).await;
        self.settle().await;
    }

    async fn settle(self) {
        *self.fork.handles() = Handles { socket: None, process: None };
        self.engine.registry.fork_died(&self.fork);
        self.fork.attach(None);
        self.fork.agent.lock().await.take();
        self.fork.save.lock().expect("no panic under this lock").take();
        self.fork.buried.send_replace(true);
    }

    fn never_lived(&mut self, failure: Failure) {
        self.last_words = Some(LastWords::Failed(failure));
        self.bury(None);
    }

    async fn watch(&mut self, process: Arc<Process>) {
        let _ = self.fork.pid.set(process.pid());
        self.fork.handles().process = Some(process.clone());
        if !self.fork.is_alive() {
            process.kill();
        }
        let (fork, socket) = (self.fork.clone(), self.socket.clone());
        let mut open = true;
        let exit = loop {
            tokio::select! {
                biased;
                message = socket.receive::<FromFork>(), if open => match message {
                    Ok(Some((message, fds))) => self.hear(message, fds),
                    Ok(None) => open = false,
                    Err(error) => {
                        fork.kill("failed", &format!("its control socket failed: {error}"));
                        open = false;
                    }
                },
                exit = process.wait() => break exit,
                () = tokio::time::sleep(EXIT_GRACE), if !open => process.kill(),
            }
        };
        while let Ok(Some((message, fds))) = socket.try_receive::<FromFork>() {
            self.hear(message, fds);
        }
        self.engine.images.remove_fork(&fork.id);
        self.bury(exit.ok());
    }

    fn hear(&mut self, message: FromFork, mut fds: Vec<OwnedFd>) {
        match message {
            FromFork::Faults { base, len } => self.page(fds.pop(), base, len),
            FromFork::Parked(_) => {
                self.permit = None;
                self.fork.progress.send_modify(|progress| progress.parked += 1);
            }
            FromFork::Acknowledged { generation, nonce, stamps } => {
                self.acknowledged(generation, nonce, &stamps)
            }
            // Nobody asked for one.
            FromFork::WorkingSet { .. } => {}
            FromFork::Dial { token, port } => vsock::answer(self.fork.clone(), token, port),
            FromFork::Forwarded { group, passage } => self.fork.ways.passed(group, passage),
            FromFork::Saved => drop(self.saved(Ok(()))),
            FromFork::Failed(failure) => {
                if !self.saved(Err(failure.clone())) {
                    self.last_words = Some(LastWords::Failed(failure));
                }
            }
            FromFork::Stopped(reason) => self.last_words = Some(LastWords::Stopped(reason)),
            FromFork::Console(bytes) => {
                self.fork.console.lock().expect("no panic under this lock").push(&bytes);
            }
        }
    }

    fn page(&self, uffd: Option<OwnedFd>, base: u64, len: u64) {
        let Some(uffd) = uffd else {
            return self.fork.kill("failed", "it sent no userfaultfd; its binary is of another build");
        };
        self.fork.paged.store(true, Ordering::Relaxed);
        let template = self.fork.template.name();
        if let Err(error) = self.engine.images.add_fork(&self.fork.id, template, uffd, base, len) {
            self.fork.kill(MEMORY, &format!("its memory cannot be paged in: {error}"));
        }
    }

    fn acknowledged(&mut self, generation: u64, nonce: u64, stamps: &Stamps) {
        self.permit = None;
        let expected = {
            let identity = self.fork.identity.lock().expect("no panic under this lock");
            (identity.generation, identity.nonce)
        };
        if expected != (generation, nonce) {
            return self.fork.kill("guest_stopped", "the guest acknowledged an identity that is not its own");
        }
        let received = self.fork.received_ns.load(Ordering::Relaxed);
        let timings = timings::split(received, stamps, timings::monotonic_ns());
        self.fork.status.send_if_modified(|status| {
            let alive = !matches!(status, Status::Died(_));
            if alive {
                *status = Status::Running(timings);
            }
            alive
        });
        self.fork.progress.send_modify(|progress| progress.acknowledged = generation);
        if let Some(outcome) = self.outcome.take() {
            if let Some(attached) = self.fork.attached() {
                let identity = self.fork.identity.lock().expect("no panic under this lock");
                attached.bind(&identity, self.fork.name.as_deref());
            }
            // Last, because the runtime runs first what was woken last: the caller's answer goes out before the net
            // process is told. What the guest sends meanwhile waits.
            let _ = outcome.send(Ok(()));
            if self.fork.is_paged() {
                self.engine.images.read_on(self.fork.template.name());
            }
        }
    }

    /// Tells the end of a save to who waits for it; false if nobody does.
    fn saved(&self, outcome: Result<(), Failure>) -> bool {
        let waiting = self.fork.save.lock().expect("no panic under this lock").take();
        waiting.is_some_and(|waiting| waiting.send(outcome).is_ok())
    }

    fn bury(&mut self, exit: Option<Exit>) {
        let (reason, message) = match &self.last_words {
            Some(LastWords::Failed(failure)) => ("failed", failure.message.clone()),
            Some(LastWords::Stopped(stop)) => ("guest_stopped", stop_text(stop)),
            None => match exit {
                Some(exit @ Exit::Code(_)) => ("exit", format!("its process {exit}")),
                Some(Exit::Signal(9)) => {
                    let killers = "the out-of-memory killer, a limit or an operator";
                    ("signal", format!("its process was killed by signal 9, by {killers}"))
                }
                Some(exit) => ("signal", format!("its process {exit}")),
                None => ("failed", "its process could not be waited for".to_owned()),
            },
        };
        let (signal, exit_code) = match exit {
            Some(Exit::Signal(signal)) => (Some(signal), None),
            Some(Exit::Code(code)) => (None, Some(code)),
            None => (None, None),
        };
        let death = Death { reason: reason.to_owned(), message, signal, exit_code, at_unix_ms: unix_ms() };
        self.fork.die(death);
        if let Some(outcome) = self.outcome.take() {
            let _ = outcome.send(Err(self.failure()));
        }
    }

    /// Why the fork was never handed out.
    fn failure(&self) -> Error {
        let (reason, cause) = match self.fork.status() {
            Status::Died(death) => (death.reason, death.message),
            Status::Creating | Status::Running(_) => unreachable!("only the dead are buried"),
        };
        let code = match &self.last_words {
            Some(LastWords::Failed(failure)) => match failure.kind {
                FailureKind::Request => Code::InvalidRequest,
                FailureKind::Snapshot => Code::SnapshotInvalid,
                FailureKind::Guest => Code::ForkGuestFailed,
                FailureKind::Host => Code::ForkFailed,
            },
            Some(LastWords::Stopped(_)) => Code::ForkGuestFailed,
            None if reason == SNAPSHOT => Code::SnapshotInvalid,
            None => Code::ForkFailed,
        };
        Error::new(code, format!("fork {} died while it was made", self.fork.id)).because(cause)
    }
}

/// Why a guest stopped, in words.
fn stop_text(stop: &StopReason) -> String {
    match stop {
        StopReason::Reset => "its guest asked for a reset or power-off".to_owned(),
        StopReason::TripleFault => "its guest had a triple fault".to_owned(),
        StopReason::AgentFailed(message) => format!("its agent gave up: {message}"),
        StopReason::KvmError(message) => format!("KVM could not go on: {message}"),
    }
}
