//! What a snapshot keeps of virtio-pmem beyond its transport.

use serde::{Deserialize, Serialize};

/// Guest-visible state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemState {
    /// Length of the root image's guest-physical range in bytes.
    pub size: u64,
}
