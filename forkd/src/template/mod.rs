//! Templates: what is on disk of them, whether they can be forked, and how they are made.

pub mod build;
pub mod initramfs;
pub mod modules;
pub mod snapshot;

mod ahead;
mod builder;
mod disk;
mod idle;
mod load;
mod recorded;
mod root;
mod scratch;
mod tool;
mod validate;
mod working_set;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use crate::{
    api::{
        error::{Code, Error},
        types::{TemplateInfo, TemplateState},
    },
    engine::Engine,
    pool::Pool,
    zygote::Zygote,
};

use ahead::Ahead;
pub use ahead::open_ahead;
pub use disk::{Record, remove, scan, unique_bytes};
pub use idle::{unload, unload_idle};
pub use validate::environment as validate_environment;

/// A template that is in memory. As long as anyone else holds it, the template is not unloaded.
#[derive(Debug)]
pub struct Loaded {
    /// Makes forks.
    pub zygote: Arc<Zygote>,
    complete: AtomicBool,
    completing: AtomicBool,
}

impl Loaded {
    /// Whether forks must register a userfaultfd.
    pub fn is_lazy(&self) -> bool {
        !self.complete.load(Ordering::Acquire)
    }
}

/// Where a template is in its life.
#[derive(Clone, Debug)]
enum Live {
    Cold,
    Loading,
    Ready(Arc<Loaded>),
    Broken(Error),
}

/// A template.
#[derive(Debug)]
pub struct Template {
    /// What is known of it without loading it.
    pub record: Record,
    dir: PathBuf,
    live: Mutex<Live>,
    pool: Pool,
    ahead: Ahead,
    /// Held while it is loaded: once, however many forks wait for it.
    loading: tokio::sync::Mutex<()>,
    /// When it was last seen in use.
    used: Mutex<Instant>,
}

impl Template {
    /// The template in `dir`, cold.
    pub fn new(record: Record, dir: PathBuf) -> Self {
        Self {
            record,
            dir,
            live: Mutex::new(Live::Cold),
            pool: Pool::default(),
            ahead: Ahead::default(),
            loading: tokio::sync::Mutex::new(()),
            used: Mutex::new(Instant::now()),
        }
    }

    /// The template in `dir` whose record cannot be read; it can only be removed.
    pub fn unreadable(name: &str, dir: PathBuf, error: Error) -> Self {
        let template = Self::new(Record::unknown(name), dir);
        template.set(Live::Broken(error));
        template
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.record.spec.name
    }

    /// Its parked forks.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Whether it was removed.
    pub fn is_retired(&self) -> bool {
        let live = self.live.lock().expect("no panic under this lock");
        matches!(&*live, Live::Broken(error) if error.code == Code::TemplateNotFound)
    }

    /// Its snapshot directory.
    pub fn snapshot_dir(&self) -> PathBuf {
        self.dir.join("snapshot")
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The loaded template; loads it if it is cold.
    pub async fn ready(self: &Arc<Self>, engine: &Arc<Engine>) -> Result<Arc<Loaded>, Error> {
        self.touch();
        if let Some(settled) = self.settled() {
            return settled;
        }
        let (template, engine) = (self.clone(), engine.clone());
        // A task of its own: a caller that goes away must not leave a half-started zygote.
        let loading = tokio::spawn(async move {
            let _one = template.loading.lock().await;
            match template.settled() {
                Some(settled) => settled,
                None => template.load(&engine).await,
            }
        });
        loading.await.unwrap_or_else(|error| {
            Err(Error::new(Code::Internal, "loading the template failed").because(error))
        })
    }

    /// Makes a broken template cold, so that it is loaded anew, and loads it.
    pub async fn reload(self: &Arc<Self>, engine: &Arc<Engine>) -> Result<Arc<Loaded>, Error> {
        {
            let mut live = self.live.lock().expect("no panic under this lock");
            if matches!(*live, Live::Broken(_)) {
                *live = Live::Cold;
            }
        }
        self.ready(engine).await
    }

    /// Ends its zygote, for good.
    pub fn retire(&self, engine: &Engine) {
        let gone = Error::new(Code::TemplateNotFound, format!("template {} was removed", self.name()));
        if let Live::Ready(loaded) = self.swap(Live::Broken(gone)) {
            loaded.zygote.kill();
        }
        self.pool.drain();
        engine.images.forget(self.name());
    }

    /// Makes it cold. Returns its zygote, which is being killed.
    pub fn unload(&self) -> Option<Arc<Zygote>> {
        self.pool.drain();
        let Live::Ready(loaded) = self.swap(Live::Cold) else { return None };
        loaded.zygote.kill();
        Some(loaded.zygote.clone())
    }

    /// As the API shows it.
    pub fn info(&self, engine: &Engine) -> TemplateInfo {
        let (state, reason, zygote_pid) = match &*self.live.lock().expect("no panic under this lock") {
            Live::Cold => (TemplateState::Cold, None, None),
            Live::Loading => (TemplateState::Loading, None, None),
            Live::Ready(loaded) => (TemplateState::Ready, None, Some(loaded.zygote.pid())),
            Live::Broken(error) => {
                let cause = error.cause.as_ref().map(|cause| format!(": {cause}")).unwrap_or_default();
                (TemplateState::Broken, Some(format!("{}{cause}", error.message)), None)
            }
        };
        TemplateInfo {
            name: self.name().to_owned(),
            state,
            reason,
            created_unix_ms: self.record.created_unix_ms,
            parent: self.record.parent.clone(),
            forks: engine.registry.forks_of(self.name()),
            zygote_pid,
            resident_bytes: engine.images.resident_bytes(self.name()),
            residency: engine.images.residency(self.name()).map(Into::into),
            disk_bytes: self.record.disk_bytes,
            disk_unique_bytes: None,
            pool: self.pool.info(),
            spec: self.record.spec.clone(),
        }
    }

    /// The error for a snapshot that was found damaged.
    pub fn damage(&self) -> Option<Error> {
        match &*self.live.lock().expect("no panic under this lock") {
            Live::Broken(error) if error.code == Code::SnapshotInvalid => Some(error.clone()),
            Live::Cold | Live::Loading | Live::Ready(_) | Live::Broken(_) => None,
        }
    }

    /// Whether its next fork has to load it.
    pub fn is_cold(&self) -> bool {
        matches!(*self.live.lock().expect("no panic under this lock"), Live::Cold)
    }

    /// Whether it is broken.
    pub fn is_broken(&self) -> bool {
        matches!(*self.live.lock().expect("no panic under this lock"), Live::Broken(_))
    }

    fn settled(&self) -> Option<Result<Arc<Loaded>, Error>> {
        match &*self.live.lock().expect("no panic under this lock") {
            Live::Ready(loaded) => Some(Ok(loaded.clone())),
            Live::Broken(error) => Some(Err(error.clone())),
            Live::Cold | Live::Loading => None,
        }
    }

    fn set(&self, live: Live) {
        drop(self.swap(live));
    }

    fn swap(&self, live: Live) -> Live {
        std::mem::replace(&mut *self.live.lock().expect("no panic under this lock"), live)
    }
}
