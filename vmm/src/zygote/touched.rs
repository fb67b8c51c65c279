//! What a fork has touched of its memory.

use std::ops::Range;

use crate::{
    channel::{self, Channel},
    memory::{guest::GuestMemory, layout::PAGE},
    protocol::{FromFork, MAX_PAGE_RUNS, PageRun},
    sys::{mapping::Mapping, pagemap::Pages},
};

/// Why it was not told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The page tables cannot be read.
    #[error("cannot read what the guest touched")]
    Pages(#[source] std::io::Error),
    /// The daemon is gone.
    #[error(transparent)]
    Channel(#[from] channel::Error),
}

/// What a guest can touch.
#[derive(Clone, Debug)]
pub struct Touchable {
    /// Its memory.
    pub memory: GuestMemory,
    /// Its root image.
    pub root: Option<Mapping>,
}

/// Tells the daemon which pages the guest has read and written until now.
///
/// # Errors
/// [`Error`]; nothing was sent then.
pub fn report(channel: &Channel, guest: &Touchable) -> Result<(), Error> {
    let write = page_runs(guest.memory.private().map_err(Error::Pages)?);
    let read = page_runs(guest.memory.shared().map_err(Error::Pages)?);
    let root = guest.root.map(|root| root.pages(Pages::Shared)).transpose().map_err(Error::Pages)?;
    let root = page_runs(root.unwrap_or_default());
    Ok(channel.send(&FromFork::WorkingSet { read, write, root }, &[])?)
}

fn page_runs(ranges: Vec<Range<u64>>) -> Vec<PageRun> {
    let runs = ranges.into_iter().map(|range| (range.start / PAGE, (range.end - range.start) / PAGE));
    runs.take(MAX_PAGE_RUNS).collect()
}
