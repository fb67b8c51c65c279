//! How much of a template is in memory, and how it came there.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::pager;

/// How a loaded template's memory came there. Memory is loaded in chunks of 64 KiB; chunks of zeros are never stored.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Residency {
    /// Chunks in memory.
    pub loaded_chunks: u64,
    /// Chunks it has.
    pub data_chunks: u64,
    /// Page faults of forks that had to wait for a chunk.
    pub demand_faults: u64,
    /// Page faults of forks on memory that is zero: answered without taking any.
    pub zero_faults: u64,
    /// Chunks read before forks asked for them, because of the recorded working set.
    pub prefetched_chunks: u64,
    /// Single pages read for the same reason.
    #[serde(default)]
    pub prefetched_pages: u64,
    /// Time spent reading, unpacking and verifying chunks, over all threads, in milliseconds.
    pub fetch_ms: f64,
}

impl From<pager::Residency> for Residency {
    fn from(residency: pager::Residency) -> Self {
        Self {
            loaded_chunks: residency.loaded_chunks,
            data_chunks: residency.data_chunks,
            demand_faults: residency.demand_faults,
            zero_faults: residency.zero_faults,
            prefetched_chunks: residency.prefetched_chunks,
            prefetched_pages: residency.prefetched_pages,
            fetch_ms: residency.fetch_time.as_secs_f64() * 1e3,
        }
    }
}
