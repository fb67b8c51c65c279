//! What the forks of a template touch first, learnt from two of them that nobody sees.

use forkling_vmm::protocol::{FirstPages, PageRun};

use super::{Loaded, Template, recorded};
use crate::{
    api::{error::chain, types::Payload},
    engine::Engine,
    fork::touched,
};

/// Tells the zygote of a template whose image is complete what its forks touch first; learns it, unless an earlier load has.
pub async fn learn(engine: &Engine, template: &Template, loaded: &Loaded) {
    let known = match recorded::kept(template).await {
        Some(known) => Some(known),
        None => record(engine, template, loaded).await,
    };
    let Some(set) = known else { return };
    let pages = |runs: &[PageRun]| runs.iter().map(|(_, pages)| pages).sum::<u64>();
    let (acknowledge, command) = (pages(&set.acknowledge), pages(&set.command));
    tracing::debug!(template = template.name(), acknowledge, command, "pages touched first are known");
    if let Err(error) = loaded.zygote.set_first_pages(set).await {
        tracing::debug!(template = template.name(), error = chain(&error), "no write set");
    }
}

async fn record(engine: &Engine, template: &Template, loaded: &Loaded) -> Option<FirstPages> {
    let has_agent = template.record.spec.payload != Payload::Null;
    match touched(engine, &loaded.zygote, has_agent).await {
        Ok(stages) => recorded::keep(template, stages).await,
        Err(error) => {
            tracing::warn!(template = template.name(), error = chain(&error), "the working set is not known");
            None
        }
    }
}
