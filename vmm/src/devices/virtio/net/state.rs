//! What a snapshot keeps of virtio-net beyond its transport.

use serde::{Deserialize, Serialize};

/// Guest-visible state. Frames on their way are lost with the machine they were on, as on any wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    /// Largest IP packet in bytes that the driver was told of.
    pub mtu: u16,
}
