//! A zygote's process ahead of need: the program is the same for every template, and its start would be the longest part of a
//! cold one's first fork.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::time::{MissedTickBehavior, interval};

use super::{Error, Load, Zygote};
use crate::{
    api::error::chain,
    control::{self, Socket},
    engine::Engine,
    process::{Doomed, Process, Spawner},
};

/// How often it is looked whether a spare one is wanted. Also what keeps its start out of the way of the fork that took the last.
const LOOKS: Duration = Duration::from_secs(2);

/// A zygote's process that has no template yet. Dropped, it is killed.
#[derive(Debug)]
pub struct Blank {
    process: Doomed,
    socket: Socket,
}

impl Blank {
    /// Starts one.
    pub async fn start(spawner: &Spawner) -> Result<Self, Error> {
        let (socket, theirs) = control::pair().map_err(Error::Start)?;
        let process = Doomed::new(spawner.spawn("zygote", theirs).await.map_err(Error::Start)?);
        Ok(Self { process, socket })
    }

    pub(super) fn into_parts(self) -> (Process, Socket) {
        (self.process.spare(), self.socket)
    }
}

/// The one that is kept while a template is cold, if any.
#[derive(Debug, Default)]
pub struct Spare(Mutex<Option<Blank>>);

impl Spare {
    /// Makes a zygote of it, or of a new process: one that was killed while it waited, or just now, is no reason to fail.
    pub async fn load(&self, spawner: &Spawner, load: Load<'_>) -> Result<Arc<Zygote>, Error> {
        let kept = self.lock().take().filter(|blank| blank.process.is_alive());
        if let Some(blank) = kept {
            match Zygote::start(blank, load).await {
                Err(Error::Ended(_) | Error::Control(_)) => {}
                outcome => return outcome,
            }
        }
        Zygote::start(Blank::start(spawner).await?, load).await
    }

    fn lock(&self) -> MutexGuard<'_, Option<Blank>> {
        self.0.lock().expect("no panic under this lock")
    }

    async fn look(&self, engine: &Engine) {
        let wanted = engine.registry.templates().iter().any(|template| template.is_cold());
        let kept = self.lock().as_ref().is_some_and(|blank| blank.process.is_alive());
        if wanted == kept {
            return;
        }
        let blank = match wanted {
            true => Blank::start(&engine.spawner).await.map(Some),
            false => Ok(None),
        };
        match blank {
            Ok(blank) => *self.lock() = blank,
            // The next load says so to who waits for it.
            Err(error) => tracing::debug!(error = chain(&error), "no zygote is kept ahead of need"),
        }
    }
}

/// Has a spare one as long as a template is cold. Does not end.
pub async fn keep(engine: Arc<Engine>) {
    let mut looks = interval(LOOKS);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        engine.spare.look(&engine).await;
    }
}
