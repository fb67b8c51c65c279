//! What a snapshot keeps of the clock chip.

use serde::{Deserialize, Serialize};

/// Guest-visible state. The time itself is the host's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CmosState {
    /// Selected register, 0 to 127.
    pub index: u8,
}
