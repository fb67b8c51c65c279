//! Pools of parked forks.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::limits::MAX_POOL;

/// What a parked fork runs before it is given out. It then goes back to its forkpoint, and nothing of it stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Rehearsal {
    /// Nothing.
    Off,
    /// The way to the acknowledgement.
    Acknowledge,
    /// The same and a command that does nothing.
    #[default]
    Command,
}

/// What a pool should hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolSettings {
    /// Parked forks at rest, at most `high`.
    #[serde(default)]
    pub low: u32,
    /// Most parked forks, 0 to 4096; 0 is no pool.
    #[serde(default)]
    pub high: u32,
    /// What they run before.
    #[serde(default)]
    pub rehearsal: Rehearsal,
    /// Whether parked forks hold what their first use needs: the pages that the rehearsal wrote, and page tables. If not they are bare: nothing
    /// runs in them before, and they take the least memory and the longest time to their first answer.
    #[serde(default = "yes")]
    pub keep_writes: bool,
    /// Whether the pages that forks read first are mapped for their guests ahead, where the host has KVM_PRE_FAULT_MEMORY.
    #[serde(default = "yes")]
    pub pre_fault: bool,
}

pub(super) fn yes() -> bool {
    true
}

impl PoolSettings {
    /// What is wrong with them, if anything is.
    ///
    /// # Errors
    /// In words.
    pub fn check(&self) -> Result<(), String> {
        let Self { low, high, .. } = *self;
        if high > MAX_POOL || low > high {
            return Err(format!(
                "low is {low} and high is {high}; high is at most {MAX_POOL}, low at most high"
            ));
        }
        Ok(())
    }
}

impl Default for PoolSettings {
    fn default() -> Self {
        Self { low: 0, high: 0, rehearsal: Rehearsal::default(), keep_writes: true, pre_fault: true }
    }
}

/// A pool.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct PoolInfo {
    /// See [`PoolSettings`].
    pub low: u32,
    /// See [`PoolSettings`].
    pub high: u32,
    /// See [`PoolSettings`].
    pub rehearsal: Rehearsal,
    /// See [`PoolSettings`].
    pub keep_writes: bool,
    /// See [`PoolSettings`].
    pub pre_fault: bool,
    /// How many parked forks are wanted now.
    pub target: u32,
    /// Parked forks.
    pub parked: u32,
    /// Being made.
    pub building: u32,
    /// Requests served by a parked fork.
    pub hits: u64,
    /// Requests that found none.
    pub misses: u64,
    /// Parked forks that died.
    pub died: u64,
    /// How long the last refill took, in milliseconds.
    pub refill_ms: f64,
}

/// Whether a request may be served by a parked fork.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PoolUse {
    /// If there is one.
    #[default]
    Use,
    /// No: the fork is made from nothing.
    Bypass,
}
