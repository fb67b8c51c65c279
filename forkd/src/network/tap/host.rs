//! The host's end of what leads out of the namespace: one of a veth pair, and one table of rules.
//!
//! No setting of the host beyond the interface's own is changed. Packets that leave the host get its address; those for
//! [`HOST`] go to its loopback, which an interface's `route_localnet` allows, and DNS queries to [`GATEWAY`] to a resolver.

use std::{
    fmt::Write as _,
    fs,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use forkling_proto::network::{GATEWAY, HOST, MTU};

use rustix::thread::{CapabilitySet, capabilities};

use super::{Error, tools::Tools};

/// Most daemons with taps on a host: each has two addresses of a /25.
pub const MAX_DAEMONS: u32 = 64;

/// First of the addresses between namespaces and host: link-local, and no address of a guest.
const FIRST: Ipv4Addr = Ipv4Addr::new(169, 254, 2, 0);

/// The same for IPv6: in the range of guests, beside those of IPv4 addresses.
const FIRST_V6: Ipv6Addr = Ipv6Addr::new(0xfd66, 0x6f72, 0x6b6c, 1, 0, 0, 0, 0);

const IPV4_FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";
const IPV6_FORWARDING: &str = "/proc/sys/net/ipv6/conf/all/forwarding";

/// Interface and table have the same name.
const PREFIX: &str = "forkling";

/// Both ends' addresses.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    index: u32,
}

impl Ends {
    /// Those of the `index`th daemon.
    pub fn new(index: u32) -> Self {
        Self { index }
    }

    /// The interface on the host, and the table there.
    pub fn name(self) -> String {
        format!("{PREFIX}{}", self.index)
    }

    /// The host's address; a /31.
    pub fn host(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(FIRST.to_bits() + 2 * self.index)
    }

    /// The namespace's.
    pub fn inner(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(FIRST.to_bits() + 2 * self.index + 1)
    }

    /// The host's; a /127.
    pub fn host_v6(self) -> Ipv6Addr {
        Ipv6Addr::from_bits(FIRST_V6.to_bits() + u128::from(2 * self.index))
    }

    /// The namespace's.
    pub fn inner_v6(self) -> Ipv6Addr {
        Ipv6Addr::from_bits(FIRST_V6.to_bits() + u128::from(2 * self.index) + 1)
    }
}

/// What lies on the host. Dropped, it is removed. Used by threads in the host's namespace only.
#[derive(Debug)]
pub struct HostSide {
    tools: Tools,
    ends: Ends,
}

/// Whether this daemon may have taps, and this host can lead packets of guests anywhere.
///
/// # Errors
/// The daemon has no privilege; the host does not forward IPv4.
pub fn check() -> Result<(), Error> {
    let wanted = CapabilitySet::NET_ADMIN | CapabilitySet::SYS_ADMIN;
    if !capabilities(None).is_ok_and(|sets| sets.effective.contains(wanted)) {
        return Err(Error::Privilege);
    }
    if !is_on(IPV4_FORWARDING) {
        return Err(Error::NotForwarding);
    }
    if !is_on(IPV6_FORWARDING) {
        tracing::info!("this host does not forward IPv6: forks reach nothing beyond it by IPv6");
    }
    Ok(())
}

/// Removes the tables of daemons that were killed: their interfaces went with them.
pub fn sweep(tools: &Tools) -> Result<(), Error> {
    let listed = tools.nft_json("list tables")?;
    let listed: serde_json::Value = serde_json::from_str(&listed)?;
    let entries = listed["nftables"].as_array().cloned().unwrap_or_default();
    for name in entries.iter().filter_map(|entry| entry["table"]["name"].as_str()) {
        let index = name.strip_prefix(PREFIX).filter(|index| index.parse::<u32>().is_ok());
        if index.is_some() && !exists(name) {
            tracing::info!(table = name, "removing the rules of a daemon that was killed");
            tools.nft(&format!("delete table inet {name}\n"))?;
        }
    }
    Ok(())
}

/// Whether the host has an interface of this name.
pub fn exists(name: &str) -> bool {
    Path::new("/proc/sys/net/ipv4/conf").join(name).exists()
}

impl HostSide {
    /// Sets up the host's end, which is there already. From a thread in the host's namespace.
    pub fn new(tools: &Tools, ends: Ends, resolvers: &[SocketAddr]) -> Result<Self, Error> {
        let side = Self { tools: tools.clone(), ends };
        let name = ends.name();
        let mut commands =
            format!("link set {name} mtu {MTU} up\naddress add {}/31 dev {name}\n", ends.host());
        if has_ipv6() {
            let _ = writeln!(commands, "address add {}/127 dev {name} nodad", ends.host_v6());
        }
        tools.ip(&commands)?;
        write_setting(&format!("/proc/sys/net/ipv4/conf/{name}/route_localnet"), "1")?;
        tools.nft(&table(ends, resolvers))?;
        Ok(side)
    }
}

impl Drop for HostSide {
    fn drop(&mut self) {
        let name = self.ends.name();
        // Interface and rules may be gone already, for instance because the start failed half-way.
        let removed = [
            self.tools.nft(&format!("add table inet {name}\ndelete table inet {name}\n")),
            if exists(&name) { self.tools.ip(&format!("link delete {name}\n")) } else { Ok(()) },
        ];
        for error in removed.into_iter().filter_map(Result::err) {
            tracing::warn!(%error, "the TAP network is not removed whole");
        }
    }
}

fn table(ends: Ends, resolvers: &[SocketAddr]) -> String {
    let (name, inner, inner_v6) = (ends.name(), ends.inner(), ends.inner_v6());
    let mut resolver = String::new();
    if let Some(SocketAddr::V4(address)) = resolvers.iter().find(|address| address.is_ipv4()) {
        let _ = write!(
            resolver,
            "iifname {name} ip daddr {GATEWAY} meta l4proto {{ tcp, udp }} th dport 53 dnat ip to {address}"
        );
    }
    format!(
        "add table inet {name}
flush table inet {name}
table inet {name} {{
  chain guard {{
    type filter hook prerouting priority raw; policy accept;
    iifname {name} ip daddr 127.0.0.0/8 drop
    iifname {name} meta nfproto ipv4 ip saddr != {inner} drop
    iifname {name} meta nfproto ipv6 ip6 saddr != {{ {inner_v6}, fe80::/10 }} drop
  }}
  chain to-host {{
    type nat hook prerouting priority dstnat; policy accept;
    iifname {name} ip daddr {HOST} dnat ip to 127.0.0.1
    {resolver}
  }}
  chain to-world {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {inner} oifname != {{ lo, {name} }} masquerade
    ip6 saddr {inner_v6} oifname != {{ lo, {name} }} masquerade
  }}
  chain wires {{
    type filter hook forward priority mangle; policy accept;
    iifname {name} tcp flags syn tcp option maxseg size set rt mtu
  }}
}}
"
    )
}

/// Whether this host speaks IPv6 at all.
pub fn has_ipv6() -> bool {
    Path::new(IPV6_FORWARDING).exists()
}

/// Writes a setting of the kernel, of the thread's own network namespace.
pub fn write_setting(path: &str, value: &str) -> Result<(), Error> {
    fs::write(path, value).map_err(|source| Error::Sysctl { path: path.to_owned(), source })
}

fn is_on(path: &str) -> bool {
    fs::read_to_string(path).is_ok_and(|value| value.trim() != "0")
}
