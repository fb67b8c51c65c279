//! The task that keeps a pool at its target.

use std::{sync::Arc, time::Instant};

use forkling_vmm::memory::layout::MIB;
use tokio::time::timeout_at;

use super::Pool;
use crate::{
    api::{
        error::chain,
        types::{Payload, PoolSettings, Rehearsal},
    },
    engine::Engine,
    fork::{NetworkChoice, Parked, park},
    limits::{HOST_RESERVE_MIB, POOL_PAUSE, POOL_TICK},
    template::{Loaded, Template},
};

/// Keeps the pool of `template` until it is configured to hold nothing, or the template is gone.
pub async fn keep(engine: Arc<Engine>, template: Arc<Template>) {
    let pool = template.pool();
    loop {
        let short = engine.admission.available() < reserve(&template);
        let gone = pool.lock().settle(short);
        if !gone.is_empty() {
            tracing::debug!(template = template.name(), forks = gone.len(), "parked forks let go");
        }
        drop(gone);
        let next = Instant::now() + POOL_TICK;
        while Instant::now() < next {
            if stop(pool, &template) {
                return;
            }
            if !short {
                refill(&engine, &template).await;
            }
            if timeout_at(next.into(), pool.work.notified()).await.is_ok() && !pool.lock().is_urgent() {
                // The fork just taken is on its way to its guest and its first command; what replaces it can wait, and
                // would be in the way.
                let _ = tokio::time::timeout(POOL_PAUSE, pool.urgent.notified()).await;
            }
        }
    }
}

/// Bytes that must stay available: a guest that is handed out may write all of its own.
fn reserve(template: &Template) -> u64 {
    (HOST_RESERVE_MIB + u64::from(template.record.spec.memory_mib)) * MIB
}

fn stop(pool: &Pool, template: &Template) -> bool {
    let mut inner = pool.lock();
    let over = inner.settings.high == 0 || template.is_retired();
    if over {
        inner.kept = false;
        inner.target = 0;
        let parked = std::mem::take(&mut inner.parked);
        drop(inner);
        drop(parked);
    }
    over
}

/// Starts as many builds as are wanted. Builds wait for their turn, so that they do not take the cores of living forks.
async fn refill(engine: &Arc<Engine>, template: &Arc<Template>) {
    if template.pool().lock().wanting() == 0 {
        return;
    }
    let Ok(loaded) = template.ready(engine).await else { return };
    if loaded.is_lazy() {
        // A parked fork needs no pager: the image is completed first, and the next tick finds it.
        loaded.complete_in_background(engine, template);
        return;
    }
    loop {
        let Ok(turn) = engine.refills.clone().acquire_owned().await else { return };
        let room = has_descriptors(engine);
        let settings = {
            let mut inner = template.pool().lock();
            if inner.wanting() == 0 || !room {
                return;
            }
            inner.building += 1;
            inner.settings
        };
        let (engine, template, loaded) = (engine.clone(), template.clone(), loaded.clone());
        tokio::spawn(async move {
            let began = Instant::now();
            let outcome = build(&engine, &template, &loaded, settings).await;
            let pool = template.pool();
            // Under other settings by now, or of another zygote: not what is wanted any more.
            let outcome = outcome.filter(|_| pool.settings() == settings && !template.is_retired());
            pool.lock().built(outcome, began.elapsed());
            drop(turn);
            pool.work.notify_one();
        });
    }
}

/// Whether the daemon has descriptors for one more: it is a fork in that.
fn has_descriptors(engine: &Engine) -> bool {
    let held = |template: &Arc<Template>| template.pool().held();
    let parked: u64 = engine.registry.templates().iter().map(held).sum();
    engine.registry.alive() + parked < engine.max_forks
}

async fn build(
    engine: &Engine,
    template: &Template,
    loaded: &Loaded,
    settings: PoolSettings,
) -> Option<Parked> {
    let mut settings = settings;
    if template.record.spec.payload == Payload::Null && settings.rehearsal == Rehearsal::Command {
        // It has no agent that could run one.
        settings.rehearsal = Rehearsal::Acknowledge;
    }
    let usual = NetworkChoice::usual(engine, &template.record.spec);
    let outcome = park(engine, &loaded.zygote, &settings, &usual).await;
    outcome
        .inspect_err(|error| {
            tracing::warn!(template = template.name(), error = chain(error), "no fork could be parked");
        })
        .ok()
}
