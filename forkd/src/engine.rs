//! What the parts of the daemon share.

use std::{path::PathBuf, sync::Arc};

use anyhow::Context as _;
use forkling_vmm::{protocol::FailureKind, snapshot::ChunkStore};
use tokio::sync::Semaphore;

use crate::{
    admission::Admission,
    api::error::{Code, Error},
    config::Config,
    fork::{MEMORY, SNAPSHOT},
    identity::Generations,
    limits,
    network::Network,
    pager::{Images, News},
    process::Spawner,
    registry::Registry,
    template,
    zygote::spare::Spare,
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
    /// A zygote's process for the next template that is loaded.
    pub spare: Spare,
    /// Images in memory and their pager.
    pub images: Images,
    /// Grants forks.
    pub admission: Arc<Admission>,
    /// Chunks of all templates on disk.
    pub chunks: ChunkStore,
    /// Addresses, links and the net process.
    pub network: Network,
    /// Forks under construction.
    pub spawns: Arc<Semaphore>,
    /// Parked forks under construction.
    pub refills: Arc<Semaphore>,
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
        let generations = Generations::open(&mark)
            .with_context(|| format!("cannot keep the generation mark {}", mark.display()))?;
        let spawner = Spawner::new(config.vmm.clone()).context("cannot start the spawner thread")?;
        let registry = Arc::new(Registry::default());
        let known = registry.clone();
        let images = Images::start(!config.eager, move |news| unserved(&known, news))
            .context("cannot start the pager")?;
        let chunks = ChunkStore::open(&config.state_dir).context("cannot keep the store of chunks")?;
        let engine = Arc::new(Self {
            registry,
            spawner,
            spare: Spare::default(),
            images,
            admission: Admission::new(config.admission, limits::spawns_in_flight()),
            chunks,
            network: Network::new(config.network.clone(), config.taps)?,
            spawns: Arc::new(Semaphore::new(limits::spawns_in_flight())),
            refills: Arc::new(Semaphore::new(limits::refills_in_flight())),
            builds: Arc::new(Semaphore::new(limits::CONCURRENT_BUILDS)),
            max_forks: limits::raise_fd_limit(),
            generations,
            config,
        });
        let templates = engine.templates_dir();
        template::scan(&engine.registry, &templates)
            .with_context(|| format!("cannot read {}", templates.display()))?;
        // Thousands of files to look at, and nobody waits for it.
        let sweeping = engine.clone();
        std::thread::Builder::new()
            .name("sweep".to_owned())
            .spawn(move || match sweeping.chunks.sweep() {
                0 => {}
                removed => tracing::info!(removed, "removed chunks that no template has"),
            })
            .context("cannot start a thread")?;
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

/// Kills the forks that wait for memory that cannot be had.
fn unserved(registry: &Registry, news: News) {
    match news {
        News::Failed { fork, failure } => {
            tracing::warn!(fork, failure = failure.message, "memory cannot be had");
            let reason = if failure.kind == FailureKind::Snapshot { SNAPSHOT } else { MEMORY };
            if let Ok(fork) = registry.fork(&fork) {
                fork.kill(reason, &failure.message);
            }
        }
        News::Stopped => {
            tracing::error!("the pager has stopped");
            for fork in registry.forks(None, false).iter().filter(|fork| fork.is_paged()) {
                fork.kill(MEMORY, "the daemon's pager has stopped; restart the daemon");
            }
        }
    }
}
