//! The working set on disk, once it is known: the next load of the template reads it ahead.

use forkling_vmm::{
    memory::layout::PAGE,
    protocol::PageRun,
    snapshot::{self, Snapshot, WorkingSet},
};

use super::Template;
use crate::{api::error::chain, fork::Touched};

/// Keeps what forks touch until their acknowledgement, and until the end of a command, unless something is kept already.
pub(super) async fn keep(template: &Template, first: Touched, all: Touched) {
    let (name, directory) = (template.name().to_owned(), template.snapshot_dir());
    let write = move || -> Result<(), snapshot::Error> {
        let snapshot = Snapshot::open(&directory)?;
        if matches!(snapshot.working_set(), Ok(Some(_))) {
            return Ok(());
        }
        let pages = snapshot.manifest().memory_bytes / PAGE;
        let (first, all) = (set(&first, pages), set(&all, pages));
        tracing::debug!(template = name, %first, %all, "working set recorded");
        all.write_after(&first, &directory)
    };
    if let Ok(Err(error)) = tokio::task::spawn_blocking(write).await {
        tracing::warn!(template = template.name(), error = chain(&error), "the working set is not kept");
    }
}

/// Of an image of so many pages. A fork may say what it likes; of a list with more pages than there are the rest is dropped.
fn set(touched: &Touched, pages: u64) -> WorkingSet {
    let numbers = |runs: &[PageRun]| -> Vec<u64> {
        let inside = |&(first, count): &PageRun| first.min(pages)..first.saturating_add(count).min(pages);
        runs.iter().flat_map(inside).take(pages as usize).collect()
    };
    WorkingSet::new(numbers(&touched.read), numbers(&touched.write))
}

#[cfg(test)]
mod tests;
