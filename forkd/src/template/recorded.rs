//! The working set on disk, once it is known: the next load of the template reads it ahead, and need not learn it.

use forkling_vmm::{
    memory::layout::PAGE,
    protocol::{FirstPages, MAX_PAGE_RUNS, PageRun},
    snapshot::{self, PageRange, Snapshot, WorkingSet},
};

use super::Template;
use crate::{
    api::error::chain,
    fork::{Stages, Touched},
};

/// What the forks of a template touch first, as an earlier load of it has kept it. `None` if it is not kept, or is of no use.
pub(super) async fn kept(template: &Template) -> Option<FirstPages> {
    let directory = template.snapshot_dir();
    let read = move || -> Result<_, snapshot::Error> {
        let snapshot = Snapshot::open(&directory)?;
        // Kept by an older build, they are of no use to the next load.
        Ok(snapshot.working_set()?.zip(snapshot.working_pages()?))
    };
    match tokio::task::spawn_blocking(read).await {
        // The same holds without its beginning.
        Ok(Ok(Some((set, _)))) if !set.acknowledge.is_empty() => Some(first_pages(&set)),
        Ok(Err(error)) => {
            tracing::warn!(template = template.name(), error = chain(&error), "working set learnt anew");
            None
        }
        _ => None,
    }
}

/// Keeps what forks touch on their way.
pub(super) async fn keep(template: &Template, stages: Stages) -> Option<FirstPages> {
    let (name, directory) = (template.name().to_owned(), template.snapshot_dir());
    let write = move || -> Result<FirstPages, snapshot::Error> {
        let image = Snapshot::open(&directory)?.manifest().memory_bytes / PAGE;
        let of = |touched: &Touched| set(touched, image);
        let (first, answer, all) = (of(&stages.acknowledge), of(&stages.answer), of(&stages.command));
        let named = of(&stages.named);
        tracing::debug!(template = name, %first, %answer, %named, %all, "working set recorded");
        // In memory, pages that only a fork with a name writes cost little to copy; from a disk they can wait.
        let all = all.with(&named).beginning_with(&first.with(&named));
        let known = first_pages(&all);
        if let Err(error) = all.write_by_stages(&[first, answer, named], &directory) {
            tracing::warn!(template = name, error = chain(&error), "the working set is not kept");
        }
        Ok(known)
    };
    match tokio::task::spawn_blocking(write).await {
        Ok(Ok(known)) => Some(known),
        Ok(Err(error)) => {
            tracing::warn!(template = template.name(), error = chain(&error), "the working set is not known");
            None
        }
        Err(_) => None,
    }
}

/// Of an image of so many pages. A fork may say what it likes: of a list with more pages than that the rest is dropped.
fn set(touched: &Touched, image: u64) -> WorkingSet {
    let numbers = |runs: &[PageRun]| -> Vec<u64> {
        let inside = |&(first, pages): &PageRun| first.min(image)..first.saturating_add(pages).min(image);
        runs.iter().flat_map(inside).take(image as usize).collect()
    };
    WorkingSet::new(numbers(&touched.read), numbers(&touched.write))
}

fn first_pages(set: &WorkingSet) -> FirstPages {
    let runs = |ranges: &[PageRange]| ranges.iter().copied().map(PageRun::from).take(MAX_PAGE_RUNS).collect();
    FirstPages {
        acknowledge: runs(&set.acknowledge),
        command: runs(&set.written_later()),
        read: runs(&set.read),
    }
}

#[cfg(test)]
mod tests;
