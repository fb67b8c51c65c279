//! The working set on disk, once it is known: the next load of the template reads it ahead.

use forkling_vmm::{
    memory::layout::PAGE,
    snapshot::{self, Snapshot, WorkingSet},
};

use super::{Template, working_set::pages};
use crate::{api::error::chain, fork::Touched};

/// Keeps what forks touch until their acknowledgement, and until the end of a command, unless something is kept already.
pub(super) async fn keep(template: &Template, first: Touched, all: Touched) {
    let (name, directory) = (template.name().to_owned(), template.snapshot_dir());
    let write = move || -> Result<(), snapshot::Error> {
        let snapshot = Snapshot::open(&directory)?;
        if matches!(snapshot.working_set(), Ok(Some(_))) {
            return Ok(());
        }
        let image = snapshot.manifest().memory_bytes / PAGE;
        let (first, all) = (set(&first, image), set(&all, image));
        tracing::debug!(template = name, %first, %all, "working set recorded");
        all.write_after(&first, &directory)
    };
    if let Ok(Err(error)) = tokio::task::spawn_blocking(write).await {
        tracing::warn!(template = template.name(), error = chain(&error), "the working set is not kept");
    }
}

/// Of an image of so many pages.
fn set(touched: &Touched, image: u64) -> WorkingSet {
    let numbers = |runs| -> Vec<u64> { pages(runs, image).collect() };
    WorkingSet::new(numbers(&touched.read), numbers(&touched.write))
}

#[cfg(test)]
mod tests;
