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
    /// The connection that forks inherit. Only without others, which take it with them when they are told to be gone.
    pub line: Option<LineState>,
}

/// A connection to the host that nothing has flowed on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LineState {
    /// Port on the host's side.
    pub host_port: u32,
    /// Port on the guest's side.
    pub guest_port: u32,
    /// What the guest can take, in bytes.
    pub buffer: u32,
}

impl VsockState {
    /// Errors: a port the host never uses, or uses otherwise; a line beside lost connections.
    pub(super) fn validate(&self) -> Result<(), Error> {
        let wrong = |field| Err(Error::Field { device: "vsock", field });
        if !(FIRST_HOST_PORT - 1..u32::MAX).contains(&self.last_port) {
            return wrong("last_port");
        }
        match &self.line {
            Some(line) if self.had_connections || line.host_port >= FIRST_HOST_PORT => wrong("line"),
            _ => Ok(()),
        }
    }
}
