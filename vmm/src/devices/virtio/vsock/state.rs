//! What a snapshot keeps of virtio-vsock beyond its transport.

use serde::{Deserialize, Serialize};

use super::FIRST_HOST_PORT;
use crate::devices::Error;

/// Guest-visible state. Connections end with the machine they were made to: their host side cannot be forked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockState {
    /// Host port of the last connection made by the host. Ports are not reused soon: the guest may remember one.
    pub last_port: u32,
    /// The guest may hold connections that no longer exist, and must be told so before it hears of new ones.
    pub had_connections: bool,
}

impl VsockState {
    /// Errors: a port the host never uses.
    pub(super) fn validate(&self) -> Result<(), Error> {
        let known = (FIRST_HOST_PORT - 1..u32::MAX).contains(&self.last_port);
        if known { Ok(()) } else { Err(Error::Field { device: "vsock", field: "last_port" }) }
    }
}
