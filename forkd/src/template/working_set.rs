//! What the forks of a template touch first, learnt from one of them that nobody sees.

use std::{collections::BTreeSet, sync::Arc};

use forkling_vmm::{
    memory::layout::{MIB, PAGE},
    protocol::{MAX_PAGE_RUNS, PageRun, WriteSet},
};

use super::{Loaded, Template, recorded};
use crate::{
    api::{
        error::chain,
        types::{Payload, Rehearsal},
    },
    engine::Engine,
    fork::{ParkError, touched},
};

/// Learns the working set of a template whose image is complete, and tells its zygote.
pub async fn learn(engine: Arc<Engine>, template: Arc<Template>, loaded: Arc<Loaded>) {
    match record(&engine, &template, &loaded).await {
        Ok(set) => {
            let pages = |runs: &[PageRun]| runs.iter().map(|(_, pages)| pages).sum::<u64>();
            let (acknowledge, command) = (pages(&set.acknowledge), pages(&set.command));
            tracing::debug!(
                template = template.name(),
                acknowledge,
                command,
                "pages written first are known"
            );
            if let Err(error) = loaded.zygote.set_write_set(set).await {
                tracing::debug!(template = template.name(), error = chain(&error), "no write set");
            }
        }
        Err(error) => {
            tracing::warn!(template = template.name(), error = chain(&error), "the working set is not known");
        }
    }
}

async fn record(engine: &Engine, template: &Template, loaded: &Loaded) -> Result<WriteSet, ParkError> {
    // The null guest runs no commands.
    let is_null = template.record.spec.payload == Payload::Null;
    let rehearsal = if is_null { Rehearsal::Acknowledge } else { Rehearsal::Command };
    let (first, all) = touched(engine, &loaded.zygote, rehearsal).await?;
    let acknowledge = first.write.clone();
    let image = u64::from(template.record.spec.memory_mib) * MIB / PAGE;
    let command = without(&all.write, &acknowledge, image);
    recorded::keep(template, first, all).await;
    Ok(WriteSet { acknowledge, command })
}

/// The numbers of the pages in `runs`, of an image of `image` pages. A fork may say what it likes: of a list with more
/// pages than that the rest is dropped.
pub(super) fn pages(runs: &[PageRun], image: u64) -> impl Iterator<Item = u64> {
    let inside = move |&(first, pages): &PageRun| first.min(image)..first.saturating_add(pages).min(image);
    runs.iter().flat_map(inside).take(image as usize)
}

/// The pages of `all` that are not in `known`, of an image of `image` pages.
fn without(all: &[PageRun], known: &[PageRun], image: u64) -> Vec<PageRun> {
    let (all, known): (BTreeSet<u64>, BTreeSet<u64>) =
        (pages(all, image).collect(), pages(known, image).collect());
    let mut runs: Vec<PageRun> = Vec::new();
    for page in all.difference(&known).copied() {
        match runs.last_mut() {
            Some((first, pages)) if *first + *pages == page => *pages += 1,
            _ => runs.push((page, 1)),
        }
    }
    runs.truncate(MAX_PAGE_RUNS);
    runs
}

#[cfg(test)]
mod tests;
