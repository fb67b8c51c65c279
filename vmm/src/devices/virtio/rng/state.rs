//! What a snapshot keeps of virtio-rng beyond its transport.

use serde::{Deserialize, Serialize};

/// Nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngState {}
