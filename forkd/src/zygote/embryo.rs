//! The process of a fork ahead of need: one for each template in use, of which a request for a fork makes a VM.

use std::{
    os::fd::AsFd,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use forkling_vmm::protocol::{Failure, ToZygote};
use tokio::{sync::Notify, time::sleep};

use super::Zygote;
use crate::{
    api::error::chain,
    control::{self, Socket},
    process::{Doomed, Process},
};

/// How long none is made after one was taken: its guest has the CPU to itself until its first command has ended.
const REST: Duration = Duration::from_millis(50);

/// How often it is looked whether the one that waits still lives.
const LOOKS: Duration = Duration::from_secs(2);

/// Why there is none.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// Its socket or process could not be had.
    #[error("the host refused")]
    Io(#[from] std::io::Error),
    /// The zygote cannot be talked to.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// The zygote is gone.
    #[error("the zygote is gone")]
    NoZygote,
    /// It said why.
    #[error("{}", .0.message)]
    Failed(Failure),
}

/// A fork's process without a VM. Dropped, it is killed.
#[derive(Debug)]
pub struct Embryo {
    /// The control socket of the fork that it will be.
    pub socket: Arc<Socket>,
    process: Doomed,
}

impl Embryo {
    /// Its process, whose end is the caller's business from now on.
    pub fn into_process(self) -> Process {
        self.process.spare()
    }

    fn is_alive(&self) -> bool {
        self.process.is_alive()
    }
}

/// Where a zygote's embryo waits.
#[derive(Debug, Default)]
pub struct Nest {
    embryo: Mutex<Option<Embryo>>,
    taken: Notify,
}

impl Nest {
    /// The embryo, if there is a living one.
    pub fn take(&self) -> Option<Embryo> {
        let embryo = self.lock().take();
        if embryo.is_some() {
            self.taken.notify_one();
        }
        embryo.filter(Embryo::is_alive)
    }

    /// Keeps one, new or not needed, until it is taken.
    pub fn put(&self, embryo: Embryo) {
        *self.lock() = Some(embryo);
    }

    fn has_living(&self) -> bool {
        self.lock().as_ref().is_some_and(Embryo::is_alive)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Embryo>> {
        self.embryo.lock().expect("no panic under this lock")
    }
}

impl Zygote {
    /// Has an embryo whenever there can be one, until the zygote ends. The template's image is complete.
    pub async fn keep_embryo(self: Arc<Self>) {
        while self.end.borrow().is_none() {
            if !self.nest.has_living() {
                match self.make_embryo().await {
                    Ok(embryo) => self.nest.put(embryo),
                    // A fork is made without it.
                    Err(error) => tracing::debug!(error = chain(&error), "no embryo is kept"),
                }
            }
            tokio::select! {
                () = self.nest.taken.notified() => sleep(REST).await,
                () = sleep(LOOKS) => {}
                _ = self.ended() => {}
            }
        }
        drop(self.nest.take());
    }

    async fn make_embryo(&self) -> Result<Embryo, Error> {
        let (socket, theirs) = control::pair()?;
        let (token, spawned) = self.expect_spawned();
        self.socket.send(&ToZygote::Embryo { token }, &[theirs.as_fd()]).await?;
        drop(theirs);
        let pid = spawned.await.map_err(|_| Error::NoZygote)?.map_err(Error::Failed)?;
        Ok(Embryo { socket: Arc::new(socket), process: Doomed::new(Process::adopt(pid)?) })
    }
}
