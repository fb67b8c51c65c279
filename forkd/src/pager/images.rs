//! The images of all loaded templates by name, lazily filled where the host can, eagerly elsewhere.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};

use forkling_vmm::memory::image;
use forkling_vmm::protocol::{Failure, PageRun};
use forkling_vmm::snapshot::{self, Manifest, PackedPages, Snapshot};

use super::{Backing, Event, Files, ForkId, Pager, Residency, Stats};
use crate::limits::PAGE_TIMEOUT;

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The snapshot cannot be read, or is damaged.
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    /// No memory for the image.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// The pager refused or has stopped.
    #[error(transparent)]
    Pager(#[from] super::Error),
    /// The image could not be loaded completely.
    #[error("{}", .0.message)]
    Load(Failure),
    /// The template's image is not in memory.
    #[error("the image of template {0} is not loaded")]
    Unknown(String),
}

/// News about the forks served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// This fork waits for memory that cannot be had: kill it, with this reason.
    Failed {
        /// As given to [`Images::add_fork`].
        fork: String,
        /// What to tell whoever asked for it.
        failure: Failure,
    },
    /// The pager is gone: kill every fork that was made while its image was incomplete.
    Stopped,
}

/// A template's memory as its zygote gets it.
#[derive(Debug)]
pub struct Opened {
    /// Read-only descriptor of the image.
    pub reader: OwnedFd,
    /// Whether pages may still be missing.
    pub lazy: bool,
    /// If so, pages that forks write before their acknowledgement, as far as that is known; they come first.
    pub written_first: Vec<PageRun>,
    /// The snapshot's manifest.
    pub manifest: Manifest,
    /// Its `state.json`.
    pub state: File,
    /// The root image, if the template has one.
    pub root: Option<File>,
}

/// Images in memory, by template.
pub struct Images {
    pager: Pager,
    lazy: bool,
    backings: Mutex<HashMap<String, Arc<Backing>>>,
    forks: Arc<Forks>,
}

/// The pager's numbers for the daemon's ids.
#[derive(Default)]
struct Forks {
    last: AtomicU64,
    by_name: Mutex<HashMap<String, ForkId>>,
}

impl Forks {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, ForkId>> {
        self.by_name.lock().expect("no panic under this lock")
    }

    fn name_of(&self, number: ForkId) -> Option<String> {
        self.lock().iter().find(|&(_, found)| *found == number).map(|(name, _)| name.clone())
    }
}

impl Images {
    /// Starts the pager. `news` is called on its thread and must not block. Images are lazy if `lazy` is wished and the
    /// host passes the self-test; the log says why not.
    pub fn start(lazy: bool, mut news: impl FnMut(News) + Send + 'static) -> Result<Self, Error> {
        let forks = Arc::new(Forks::default());
        let known = Arc::clone(&forks);
        let pager = Pager::start(PAGE_TIMEOUT, move |event| match event {
            Event::Failed { fork, failure } => {
                // Unknown when it was removed meanwhile: dead.
                if let Some(fork) = known.name_of(fork) {
                    news(News::Failed { fork, failure });
                }
            }
            Event::Stopped => news(News::Stopped),
        })?;
        let usable = image::self_test().inspect_err(|error| {
            if lazy {
                tracing::warn!("images are loaded eagerly: {error}");
            }
        });
        Ok(Self { pager, lazy: lazy && usable.is_ok(), backings: Mutex::default(), forks })
    }

    /// Whether images are filled while forks use them.
    pub fn is_lazy(&self) -> bool {
        self.lazy
    }

    /// Makes the image of `template` and begins to read its recorded working set, or takes the image that there is. Blocks: where
    /// images are eager, it reads all.
    pub fn open(&self, template: &str, files: Files) -> Result<Opened, Error> {
        let Files { snapshot, pages, state, root } = files;
        let known = self.lock().get(template).cloned();
        let backing = match known {
            Some(backing) => backing,
            None => self.back(template, snapshot, pages)?,
        };
        let len = backing.image().len();
        let reader = backing.reader().try_clone_to_owned();
        let reader = reader.map_err(|source| image::Error::Create { len, source })?;
        let lazy = !backing.is_complete();
        let written_first = if lazy { backing.written_first() } else { Vec::new() };
        let manifest = backing.snapshot().manifest().clone();
        Ok(Opened { reader, lazy, written_first, manifest, state, root })
    }

    fn back(
        &self,
        template: &str,
        snapshot: Snapshot,
        pages: Option<PackedPages>,
    ) -> Result<Arc<Backing>, Error> {
        let backing = if self.lazy { Backing::new(snapshot, pages) } else { Backing::eager(snapshot) };
        let backing = Arc::new(backing?);
        if self.lazy {
            self.prefetch(template, &backing)?;
        } else {
            self.load(&backing)?;
        }
        self.lock().insert(template.to_owned(), Arc::clone(&backing));
        Ok(backing)
    }

    /// Has the recorded working set read while the zygote starts.
    fn prefetch(&self, template: &str, backing: &Arc<Backing>) -> Result<(), Error> {
        match self.pager.prefetch(backing) {
            Err(super::Error::Snapshot(error)) => {
                tracing::warn!(template, "the recorded working set is of no use: {error}");
                Ok(())
            }
            result => Ok(result?),
        }
    }

    /// Makes ready what the first fork of a template that is not loaded would have to wait for.
    pub fn warm(&self) {
        // A stopped pager is told to whoever needs it.
        let _ = self.pager.warm();
    }

    /// Reads what forks of a template touch next: one of them has acknowledged.
    pub fn read_on(&self, template: &str) {
        if let Ok(backing) = self.backing(template) {
            let _ = self.pager.read_on(&backing);
        }
    }

    /// Lets go of a template's image: what nobody maps any more is given back. Its forks keep their pages and are served as
    /// before; loads of it end.
    pub fn forget(&self, template: &str) {
        let backing = self.lock().remove(template);
        if let Some(backing) = backing {
            self.pager.abandon(&backing);
        }
    }

    /// Serves the missing pages of a fork from now on. The id must not be in use.
    pub fn add_fork(
        &self,
        fork: &str,
        template: &str,
        uffd: OwnedFd,
        base: u64,
        len: u64,
    ) -> Result<(), Error> {
        let backing = self.backing(template)?;
        let number = ForkId(self.forks.last.fetch_add(1, Ordering::Relaxed));
        let before = self.forks.lock().insert(fork.to_owned(), number);
        assert!(before.is_none(), "fork {fork} is served already");
        let added = self.pager.add_fork(number, &backing, uffd, base, len);
        if added.is_err() {
            self.forks.lock().remove(fork);
        }
        Ok(added?)
    }

    /// Stops serving a fork whose process is dead; unknown ids are fine.
    pub fn remove_fork(&self, fork: &str) {
        let number = self.forks.lock().remove(fork);
        if let Some(number) = number {
            self.pager.remove_fork(number);
        }
    }

    /// Fills the rest of a template's image. Blocks until it is complete: forks made from then on need no userfaultfd.
    pub fn load_all(&self, template: &str) -> Result<(), Error> {
        self.load(&self.backing(template)?)
    }

    fn load(&self, backing: &Arc<Backing>) -> Result<(), Error> {
        let (sender, done) = mpsc::sync_channel(1);
        self.pager.load_all(backing, move |result| {
            // Nobody waits any more.
            let _ = sender.send(result);
        })?;
        done.recv().map_err(|_| super::Error::Stopped)?.map_err(Error::Load)
    }

    /// How much of a template is in memory; `None` when it is not loaded.
    pub fn residency(&self, template: &str) -> Option<Residency> {
        self.backing(template).ok()?.residency().ok()
    }

    /// Bytes of a template's image in memory; `None` when it is not loaded.
    pub fn resident_bytes(&self, template: &str) -> Option<u64> {
        Some(self.residency(template)?.resident_bytes)
    }

    /// The pager's counters.
    pub fn stats(&self) -> Stats {
        self.pager.stats()
    }

    fn backing(&self, template: &str) -> Result<Arc<Backing>, Error> {
        self.lock().get(template).cloned().ok_or_else(|| Error::Unknown(template.to_owned()))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Backing>>> {
        self.backings.lock().expect("no panic under this lock")
    }
}

impl std::fmt::Debug for Images {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Images").field("lazy", &self.lazy).finish_non_exhaustive()
    }
}
