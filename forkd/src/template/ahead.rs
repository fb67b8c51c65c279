//! Snapshots of cold templates, opened before anybody asks for a fork: a disk's first answers take longest, and the first ones are
//! about where everything is.

use std::{
    cmp::Reverse,
    sync::{Mutex, MutexGuard},
};

use super::Template;
use crate::{engine::Engine, pager::Files};

/// Most snapshots that are kept open, those of the latest templates; four descriptors each.
const MOST: usize = 16;

/// Most bytes of memory for one of them: the index of 8 GiB that are all different.
const MOST_BYTES: u64 = 5 << 20;

/// The files of a cold template, open, if they are.
#[derive(Debug, Default)]
pub(super) struct Ahead(Mutex<Option<Files>>);

impl Ahead {
    pub fn take(&self) -> Option<Files> {
        self.lock().take()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Files>> {
        self.0.lock().expect("no panic under this lock")
    }
}

/// Opens the snapshots of cold templates. Blocks. What fails here fails again for who asks for a fork, and is told then.
pub fn open_ahead(engine: &Engine) {
    let mut templates = engine.registry.templates();
    templates.sort_by_key(|template| Reverse(template.record.created_unix_ms));
    templates.iter().take(MOST).for_each(|template| template.open_ahead());
    if !templates.is_empty() {
        engine.images.warm();
    }
}

impl Template {
    fn open_ahead(&self) {
        if !self.is_cold() {
            return;
        }
        let files = Files::open(&self.snapshot_dir()).ok().filter(|files| files.weight() <= MOST_BYTES);
        *self.ahead.lock() = files;
        // Loaded meanwhile, it may have other files by the time it is cold again.
        if !self.is_cold() {
            self.ahead.take();
        }
    }
}
