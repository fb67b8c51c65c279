//! Forwarded ports and sockets of forks.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A port of a guest to forward.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForwardPort {
    /// TCP port of the guest's loopback, 1 to 65535.
    pub guest_port: u32,
    /// Loopback address and port to listen on; port 0 for any that is free. `127.0.0.1:0` if neither this nor `unix` is
    /// given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "127.0.0.1:0")]
    pub host: Option<String>,
    /// Instead of `host`: name of a Unix socket in the fork's runtime directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unix: Option<String>,
}

/// A forwarded port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PortInfo {
    /// Names it among the fork's ports.
    pub id: String,
    /// TCP port of the guest's loopback.
    pub guest_port: u16,
    /// Address the daemon listens on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Path of the Unix socket the daemon listens on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unix: Option<String>,
    /// Connections through it.
    pub connections: PortConnections,
}

/// Connections through a forwarded port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PortConnections {
    /// Now.
    pub open: u64,
    /// Ever accepted by the daemon.
    pub total: u64,
    /// Of those, closed because nobody listens on the guest's port, or the guest could not take them.
    pub refused: u64,
}

/// The forwarded ports of a fork.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Ports {
    /// Oldest first.
    pub ports: Vec<PortInfo>,
}

/// A fork's vsock socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VsockInfo {
    /// Path of the Unix socket that takes `CONNECT <port>`. A guest that connects to host port P reaches who listens on this
    /// path with `_P` behind it.
    pub path: String,
}
