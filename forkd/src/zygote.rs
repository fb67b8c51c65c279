//! A template's zygote process, as the daemon holds it.

pub mod embryo;
pub mod spare;

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use forkling_vmm::{
    protocol::{Failure, FailureKind, FirstPages, FromZygote, ToZygote, View},
    snapshot::Manifest,
};
use tokio::{
    sync::{oneshot, watch},
    time::timeout,
};

use crate::{
    control::{self, Socket},
    limits::LOAD_TIMEOUT,
    process::Process,
};
use embryo::Nest;
use spare::Blank;

/// Why there is no zygote.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The process could not be started.
    #[error("cannot start the zygote process; is forkling-vmm beside forkd, or given by --vmm?")]
    Start(#[source] io::Error),
    /// It refused the snapshot.
    #[error("the snapshot cannot be forked here: {}", .0.message)]
    Refused(Failure),
    /// It ended, or said nothing in time, before the snapshot was loaded.
    #[error("the zygote {0} before it had loaded the snapshot")]
    Ended(String),
    /// Its control socket failed.
    #[error("cannot talk to the zygote")]
    Control(#[from] control::Error),
}

/// The descriptors a zygote works from.
#[derive(Clone, Copy, Debug)]
pub struct Load<'a> {
    /// The snapshot's manifest.
    pub manifest: &'a Manifest,
    /// Its `state.json`.
    pub state: BorrowedFd<'a>,
    /// The image memfd, read-only.
    pub image: BorrowedFd<'a>,
    /// The root image.
    pub root: Option<BorrowedFd<'a>>,
    /// Whether forks have a NIC.
    pub nic: bool,
    /// When forks that had nothing to do give back memory.
    pub trim_after: Option<Duration>,
}

/// The answer to a spawn: the fork's process id.
pub type Spawned = oneshot::Receiver<Result<i32, Failure>>;

type Pending = HashMap<u64, oneshot::Sender<Result<i32, Failure>>>;

/// A running zygote. Dropped, it is killed.
#[derive(Debug)]
pub struct Zygote {
    process: Process,
    socket: Socket,
    nic: bool,
    /// Spawns under way; `None` when the process has ended.
    pending: Mutex<Option<Pending>>,
    token: AtomicU64,
    nest: Nest,
    end: watch::Sender<Option<String>>,
}

impl Zygote {
    /// Makes a zygote of a process that has no template yet, and waits until it can fork.
    pub async fn start(blank: Blank, load: Load<'_>) -> Result<Arc<Self>, Error> {
        let (process, socket) = blank.into_parts();
        let zygote = Arc::new(Self {
            process,
            socket,
            nic: load.nic,
            pending: Mutex::new(Some(HashMap::new())),
            token: AtomicU64::new(1),
            nest: Nest::default(),
            end: watch::Sender::new(None),
        });
        match timeout(LOAD_TIMEOUT, zygote.load(load)).await {
            Ok(Ok(())) => {
                tokio::spawn(zygote.clone().supervise());
                Ok(zygote)
            }
            outcome => {
                zygote.process.kill();
                let exit = zygote.process.wait().await;
                let exit = exit.map_or_else(|error| error.to_string(), |exit| exit.to_string());
                match outcome {
                    Ok(Err(Error::Ended(_))) => Err(Error::Ended(exit)),
                    Ok(Err(error)) => Err(error),
                    _ => Err(Error::Ended(format!("gave no answer in {} s", LOAD_TIMEOUT.as_secs()))),
                }
            }
        }
    }

    async fn load(&self, load: Load<'_>) -> Result<(), Error> {
        let mut fds = vec![load.state, load.image];
        fds.extend(load.root);
        let trim_after_ms = load.trim_after.map(|quiet| quiet.as_millis().try_into().unwrap_or(u32::MAX));
        let (manifest, root) = (load.manifest.encode(), load.root.is_some());
        self.socket.send(&ToZygote::Load { manifest, root, trim_after_ms }, &fds).await?;
        match self.socket.receive::<FromZygote>().await? {
            Some((FromZygote::Loaded, _)) => Ok(()),
            Some((FromZygote::LoadFailed(failure), _)) => Err(Error::Refused(failure)),
            Some((FromZygote::Spawned { .. } | FromZygote::SpawnFailed { .. }, _)) | None => {
                Err(Error::Ended(String::new()))
            }
        }
    }

    /// Whether its forks have a NIC.
    pub fn has_nic(&self) -> bool {
        self.nic
    }

    /// Asks for a fork whose control socket is `theirs`, with the wire `frames` if it is to have a NIC. For `pre_fault` see
    /// [`ToZygote::Spawn`].
    pub async fn spawn(
        &self,
        theirs: OwnedFd,
        frames: Option<OwnedFd>,
        view: View,
        pre_fault: bool,
    ) -> Result<Spawned, control::Error> {
        let (token, spawned) = self.expect_spawned();
        let mut fds = vec![theirs.as_fd()];
        fds.extend(frames.as_ref().map(AsFd::as_fd));
        self.socket.send(&ToZygote::Spawn { token, view, pre_fault }, &fds).await?;
        Ok(spawned)
    }

    /// Where its embryo waits.
    pub fn nest(&self) -> &Nest {
        &self.nest
    }

    /// A token for a question, and where its answer will be.
    fn expect_spawned(&self) -> (u64, Spawned) {
        let token = self.token.fetch_add(1, Ordering::Relaxed);
        let (sender, spawned) = oneshot::channel();
        if let Some(pending) = self.pending.lock().expect("no panic under this lock").as_mut() {
            pending.insert(token, sender);
        }
        (token, spawned)
    }

    /// Says what its forks touch first.
    pub async fn set_first_pages(&self, set: FirstPages) -> Result<(), control::Error> {
        self.socket.send(&ToZygote::FirstPages(set), &[]).await
    }

    /// Process id.
    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// Kills it. Its forks live on.
    pub fn kill(&self) {
        self.process.kill();
    }

    /// Waits for its end and says how it ended.
    pub async fn ended(&self) -> String {
        let mut end = self.end.subscribe();
        let reason = end.wait_for(Option::is_some).await.expect("the sender lives as long as self");
        reason.clone().expect("just waited for it")
    }

    async fn supervise(self: Arc<Self>) {
        let mut open = true;
        let exit = loop {
            tokio::select! {
                biased;
                message = self.socket.receive::<FromZygote>(), if open => match message {
                    Ok(Some((message, _))) => self.answer(message),
                    // End or nonsense: a zygote that cannot be talked to is of no use.
                    Ok(None) | Err(_) => {
                        open = false;
                        self.process.kill();
                    }
                },
                exit = self.process.wait() => break exit,
            }
        };
        while let Ok(Some((message, _))) = self.socket.try_receive::<FromZygote>() {
            self.answer(message);
        }
        let reason =
            exit.map_or_else(|error| format!("could not be waited for: {error}"), |exit| exit.to_string());
        let pending = self.pending.lock().expect("no panic under this lock").take();
        for (_, sender) in pending.into_iter().flatten() {
            let message = format!("the zygote {reason}");
            let _ = sender.send(Err(Failure { kind: FailureKind::Host, message }));
        }
        self.end.send_replace(Some(reason));
    }

    fn answer(&self, message: FromZygote) {
        let (token, outcome) = match message {
            FromZygote::Spawned { token, pid } => (token, Ok(pid)),
            FromZygote::SpawnFailed { token, failure } => (token, Err(failure)),
            FromZygote::Loaded | FromZygote::LoadFailed(_) => return,
        };
        let mut pending = self.pending.lock().expect("no panic under this lock");
        if let Some(sender) = pending.as_mut().and_then(|pending| pending.remove(&token)) {
            let _ = sender.send(outcome);
        }
    }
}
