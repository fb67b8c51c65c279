//! What the parts of the daemon share.

use std::{path::PathBuf, sync::Arc};

use anyhow::Context as _;
use tokio::sync::Semaphore;

use crate::{
    api::error::{Code, Error},
    config::Config,
    identity::Generations,
    limits,
    process::Spawner,
    registry::Registry,
    template::{self, image::Images},
};

/// The daemon's state.
#[derive(Debug)]
pub struct Engine {
    /// Settings.
    pub config: Config,
    /// Templates and forks.
    pub registry: Arc<Registry>,
    /// Starts processes.
    pub spawner: Spawner,
    /// Images in memory and their pager.
    pub images: Images,
    /// Forks under construction.
    pub spawns: Arc<Semaphore>,
    /// Builds under way.
    pub builds: Arc<Semaphore>,
    /// Most living forks.
    pub max_forks: u64,
    generations: Generations,
}

impl Engine {
    /// Puts the parts together. The state directory is this daemon's alone.
    pub fn new(config: Config) -> anyhow::Result<Arc<Self>> {
        let mark = config.state_dir.join("generation");
        let generations =
            Generations::open(&mark).with_context(|| format!("cannot keep the generation mark {}", mark.display()))?;
        let spawner = Spawner::new(config.vmm.clone()).context("cannot start the spawner thread")?;
        let engine = Arc::new(Self {
            registry: Arc::new(Registry::default()),
            spawner,
            images: Images::default(),
            spawns: Arc::new(Semaphore::new(limits::spawns_in_flight())),
            builds: Arc::new(Semaphore::new(limits::CONCURRENT_BUILDS)),
            max_forks: limits::raise_fd_limit(),
            generations,
            config,
        });
        let templates = engine.templates_dir();
        template::scan(&engine.registry, &templates)
            .with_context(|| format!("cannot read {}", templates.display()))?;
        Ok(engine)
    }

    /// A generation that was never used on this host.
    pub fn generation(&self) -> Result<u64, Error> {
        let full = || {
            Error::new(Code::Internal, "the generation mark cannot be kept on disk")
                .because("is the state directory full or read-only?")
        };
        self.generations.next().ok_or_else(full)
    }

    /// Where templates lie.
    pub fn templates_dir(&self) -> PathBuf {
        self.config.state_dir.join("templates")
    }

    /// Where root images made from recipes are kept.
    pub fn cache_dir(&self) -> PathBuf {
        self.config.state_dir.join("cache")
    }
}
