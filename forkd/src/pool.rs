//! The pool of a template: parked forks, kept between two watermarks by a task of their own.
//!
//! A pool holds `low` parked forks at rest. A request that finds it empty makes it grow, doubling up to `high`; when
//! nobody has asked for a while, or the host runs short of memory, it shrinks again. Refills run a few at a time beside
//! living forks, never more than half of the cores (`Engine::refills`).

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use crate::{
    api::types::{PoolInfo, PoolSettings},
    fork::Parked,
    limits::{POOL_IDLE, POOL_PATIENCE, POOL_TICK},
};

mod keeper;
mod kept;

pub use keeper::keep;
pub use kept::{resume, write};

/// Parked forks of one template.
#[derive(Debug, Default)]
pub struct Pool {
    inner: Mutex<Inner>,
    /// Told when there may be work for the keeper.
    work: Notify,
    /// Told when the work cannot wait.
    urgent: Notify,
    /// Held while settings are changed, so that those that are kept are those that hold.
    changing: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Inner {
    settings: PoolSettings,
    /// How many forks are wanted now, `low` to `high`.
    target: u32,
    /// Oldest first.
    parked: VecDeque<Parked>,
    building: u32,
    hits: u64,
    misses: u64,
    died: u64,
    /// Milliseconds of the last refill.
    refill_ms: f64,
    /// Whether a request found nothing since the last refill.
    missed: bool,
    /// Failures in a row, and when to try again.
    failures: u32,
    not_before: Option<Instant>,
    last_request: Option<Instant>,
    /// Whether a keeper runs.
    kept: bool,
}

impl Pool {
    /// Changes what the pool should hold, and gets it going. The parked forks of other settings are let go.
    pub fn configure(&self, settings: PoolSettings) -> Configured {
        let mut inner = self.lock();
        let PoolSettings { low, high, .. } = inner.settings;
        let other = inner.settings != PoolSettings { low, high, ..settings };
        let stale = if other { std::mem::take(&mut inner.parked) } else { VecDeque::new() };
        inner.target = settings.low;
        inner.failures = 0;
        inner.not_before = None;
        inner.settings = settings;
        let start = settings.high > 0 && !std::mem::replace(&mut inner.kept, true);
        drop(inner);
        drop(stale);
        self.work.notify_one();
        Configured { start }
    }

    /// To be held from [`Pool::configure`] until the settings are kept.
    pub async fn changing(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.changing.lock().await
    }

    /// Takes a parked fork out. `None`: there is none; a later request finds more.
    pub fn claim(&self) -> Option<Parked> {
        let mut inner = self.lock();
        if inner.settings.high == 0 {
            return None;
        }
        inner.last_request = Some(Instant::now());
        // The youngest: what it touched last is still in the caches.
        let claimed = inner.parked.pop_back();
        if claimed.is_some() {
            inner.hits += 1;
        } else {
            inner.misses += 1;
            inner.missed = true;
            inner.target = (inner.target * 2).clamp(1, inner.settings.high);
        }
        let (wanting, urgent) = (inner.wanting() > 0, inner.is_urgent());
        drop(inner);
        if wanting {
            self.work.notify_one();
        }
        if wanting && urgent {
            self.urgent.notify_waiters();
        }
        claimed
    }

    /// Takes a parked fork back that was claimed and not used.
    pub fn give_back(&self, parked: Parked) {
        let mut inner = self.lock();
        inner.hits -= 1;
        inner.parked.push_back(parked);
    }

    /// Lets go of all parked forks, for instance because their template goes.
    pub fn drain(&self) {
        let parked = std::mem::take(&mut self.lock().parked);
        drop(parked);
    }

    /// Lets go of all parked forks but the youngest `keep`, whose memory is needed for others, and makes none for a
    /// while. Returns how many.
    pub fn give_up(&self, keep: usize) -> usize {
        let mut inner = self.lock();
        let surplus = inner.parked.len().saturating_sub(keep);
        if surplus > 0 {
            inner.not_before = Some(Instant::now() + POOL_TICK);
        }
        let gone: Vec<_> = inner.parked.drain(..surplus).collect();
        drop(inner);
        gone.len()
    }

    /// What it should hold.
    pub fn settings(&self) -> PoolSettings {
        self.lock().settings
    }

    /// How many forks it holds.
    pub fn parked(&self) -> u64 {
        self.lock().parked.len() as u64
    }

    /// How many forks it holds or is making.
    fn held(&self) -> u64 {
        let inner = self.lock();
        inner.parked.len() as u64 + u64::from(inner.building)
    }

    /// As the API shows it.
    pub fn info(&self) -> PoolInfo {
        let inner = self.lock();
        let PoolSettings { low, high, rehearsal, keep_writes, pre_fault } = inner.settings;
        PoolInfo {
            low,
            high,
            rehearsal,
            keep_writes,
            pre_fault,
            target: inner.target,
            parked: inner.parked.len() as u32,
            building: inner.building,
            hits: inner.hits,
            misses: inner.misses,
            died: inner.died,
            refill_ms: inner.refill_ms,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no panic under this lock")
    }
}

/// What is left to do after [`Pool::configure`].
#[must_use]
pub struct Configured {
    /// Whether [`keep`] is to be started.
    pub start: bool,
}

impl Inner {
    /// How many forks are to be made.
    fn wanting(&self) -> u32 {
        if self.not_before.is_some_and(|instant| Instant::now() < instant) {
            return 0;
        }
        self.target.saturating_sub(self.parked.len() as u32 + self.building)
    }

    /// Whether forks are taken faster than a refill that waits could make them.
    fn is_urgent(&self) -> bool {
        self.missed || (self.target > 1 && self.parked.len() as u32 * 2 < self.target)
    }

    /// Adapts the target to what has happened since; returns the forks that are too many now, and the dead.
    fn settle(&mut self, short_of_memory: bool) -> Vec<Parked> {
        let idle = self.last_request.is_none_or(|last| last.elapsed() > POOL_IDLE);
        if short_of_memory {
            self.target = 0;
        } else if idle {
            self.target = self.settings.low;
        } else {
            self.target = self.target.clamp(self.settings.low, self.settings.high);
        }
        let (living, mut gone): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.parked).into_iter().partition(Parked::is_alive);
        self.died += gone.len() as u64;
        self.parked = living.into();
        let surplus = self.parked.len().saturating_sub(self.target as usize);
        gone.extend(self.parked.drain(..surplus));
        gone
    }

    fn built(&mut self, outcome: Option<Parked>, took: Duration) {
        self.building -= 1;
        self.missed = false;
        match outcome {
            Some(parked) => {
                self.failures = 0;
                self.refill_ms = took.as_secs_f64() * 1000.0;
                self.parked.push_back(parked);
            }
            None => {
                self.failures += 1;
                // Longer with each failure in a row, up to half a minute and more.
                let pause = POOL_PATIENCE * 2u32.saturating_pow(self.failures.min(9));
                self.not_before = Some(Instant::now() + pause);
            }
        }
    }
}
