//! The files of a snapshot that its first fork needs, open.

use std::fs::File;
use std::path::Path;

use forkling_vmm::snapshot::{self, PackedPages, Snapshot};

/// A snapshot that is open and of which nothing is in memory but what tells where it is: manifest, index, numbers of pages.
pub struct Files {
    pub(super) snapshot: Snapshot,
    /// The pages of the recorded working set, if they are of any use.
    pub(super) pages: Option<PackedPages>,
    pub(super) state: File,
    pub(super) root: Option<File>,
}

impl Files {
    /// Opens the snapshot in `directory`.
    ///
    /// # Errors
    /// When it cannot be read, or is damaged.
    pub fn open(directory: &Path) -> Result<Self, snapshot::Error> {
        let snapshot = Snapshot::open(directory)?;
        let pages = snapshot.working_pages().unwrap_or_else(|error| {
            tracing::warn!("the pages of a recorded working set are of no use: {error}");
            None
        });
        let (state, root) = (snapshot.open_state()?, snapshot.open_root()?);
        Ok(Self { snapshot, pages, state, root })
    }

    /// Bytes of memory that it takes, roughly.
    pub fn weight(&self) -> u64 {
        let index = self.snapshot.index();
        32 * index.unique_chunks() + 4 * index.chunks()
    }
}

impl std::fmt::Debug for Files {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Files").field("state", &self.state).finish_non_exhaustive()
    }
}
