//! Networks of forks: what is asked for, what is told.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use forkling_net::control::{self, Counters, Limits};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::network::Backend;

/// The network of a template's forks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TemplateNetwork {
    /// Whether there is a NIC. A Linux guest has one if nothing is said, a null payload never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nic: Option<bool>,
    /// What forks that say nothing may reach, and the template while it is built. Nothing if empty. For rules see
    /// `ForkNetworkRequest`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(example = json!(["deb.debian.org:80", "*.pypi.org:443"]))]
    pub egress: Vec<String>,
}

/// The network of forks to be made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkNetworkRequest {
    /// What they may reach; the template's if not given, nothing if empty. A rule is
    /// `[tcp://|udp://|icmp://]DESTINATION[:PORTS]`. DESTINATION is an address or CIDR (IPv6 in brackets if ports follow),
    /// a domain name, `*.` and a domain name, `host` for the host's loopback (`host.forkling.internal` in the guest), or
    /// `internet`. PORTS are numbers and ranges, with commas. Private and other special-purpose addresses are reached
    /// only by a rule inside of their range, an address of the host only by a rule for that address. Names open only the
    /// public addresses that the daemon's resolver gave for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = json!(["example.com:443", "udp://192.0.2.1:53", "host:8080"]))]
    pub egress: Option<Vec<String>>,
    /// Name of a group. Its forks reach each other, by address and by name, and no other fork reaches them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// The address of a single fork; any free one if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub ipv4: Option<Ipv4Addr>,
    /// How much each may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
}

/// A fork's place in the network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForkNetwork {
    /// MAC address of its NIC.
    pub mac: String,
    /// Its address.
    #[schema(value_type = String)]
    pub ipv4: Ipv4Addr,
    /// The same for IPv6.
    #[schema(value_type = String)]
    pub ipv6: Ipv6Addr,
    /// Its group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// What it may reach.
    pub egress: Vec<String>,
    /// What carries its frames.
    #[serde(default)]
    pub backend: Backend,
}

/// The network of a fork, and what it did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForkNetworkInfo {
    /// Its place and its rules.
    #[serde(flatten)]
    pub network: ForkNetwork,
    /// How much it may use.
    pub limits: Limits,
    /// What it carried since it was made.
    pub counters: Counters,
    /// What it was denied, oldest first: the latest of them, from number `denials_from` on.
    pub denials: Vec<NetworkDenial>,
}

/// Changes to the network of a fork.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetForkNetwork {
    /// What it may reach from now on; connections that are not allowed any more are reset.
    pub egress: Vec<String>,
}

/// Something that a fork was denied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetworkDenial {
    /// Counts its denials, from 0.
    pub number: u64,
    /// Milliseconds since 1970.
    pub at_unix_ms: u64,
    /// What: `tcp`, `udp`, `icmp`, `dns`, `source`, `fragment`, or another IP protocol by number.
    pub what: String,
    /// The name asked for, or under which the address was known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub address: Option<IpAddr>,
    /// The port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

impl From<control::Denial> for NetworkDenial {
    fn from(denial: control::Denial) -> Self {
        let control::Denial { number, at_unix_ms, what, name, address, port } = denial;
        Self { number, at_unix_ms, what, name, address, port }
    }
}
