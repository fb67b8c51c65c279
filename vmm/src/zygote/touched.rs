//! What a fork has touched of its memory.

use std::ops::Range;

use crate::{
    channel::{self, Channel},
    memory::{guest::GuestMemory, layout::PAGE},
    protocol::{FromFork, MAX_PAGE_RUNS, PageRun},
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

/// Tells the daemon which pages of `memory` the guest has read and written until now.
///
/// # Errors
/// [`Error`]; nothing was sent then.
pub fn report(channel: &Channel, memory: &GuestMemory) -> Result<(), Error> {
    let write = page_runs(memory.private().map_err(Error::Pages)?);
    let read = page_runs(memory.shared().map_err(Error::Pages)?);
    Ok(channel.send(&FromFork::WorkingSet { read, write }, &[])?)
}

fn page_runs(ranges: Vec<Range<u64>>) -> Vec<PageRun> {
    let runs = ranges.into_iter().map(|range| (range.start / PAGE, (range.end - range.start) / PAGE));
    runs.take(MAX_PAGE_RUNS).collect()
}
