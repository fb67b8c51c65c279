//! What a guest may reach: pure decisions over addresses and names.

use std::{collections::HashSet, net::IpAddr, sync::LazyLock};

use forkling_proto::network::{GATEWAY, HOST, TEMPLATE, TEMPLATE_V6};
use ipnet::{IpNet, Ipv4Net};

use crate::control::{Destination, Policy, Protocol, Rule};

#[cfg(test)]
mod tests;

/// Ranges that no rule opens: what a socket of this host would take for itself or for many, and IPv4 in disguise.
pub const NEVER: [&str; 9] = [
    "0.0.0.0/8",
    "127.0.0.0/8",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "::/96",
    "::ffff:0:0/96",
    "::ffff:0:0:0/96",
    "fe80::/10",
    "ff00::/8",
];

/// Special-purpose ranges (IANA registries of RFC 6890, and the IPv6 ranges that carry an IPv4 address).
pub const SPECIAL: [&str; 29] = [
    "10.0.0.0/8",
    "100.64.0.0/10",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.31.196.0/24",
    "192.52.193.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "192.175.48.0/24",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "168.63.129.16/32",
    "64:ff9b::/96",
    "64:ff9b:1::/48",
    "100::/64",
    "100:0:0:1::/64",
    "2001::/23",
    "2001::/32",
    "2001:db8::/32",
    "2002::/16",
    "2620:4f:8000::/48",
    "3fff::/20",
    "5f00::/16",
    "fc00::/7",
    "fec0::/10",
    "fd00:ec2::254/128",
];

static NEVER_NETS: LazyLock<Vec<IpNet>> = LazyLock::new(|| parse(&NEVER));
static SPECIAL_NETS: LazyLock<Vec<IpNet>> = LazyLock::new(|| parse(&SPECIAL));

fn parse(nets: &[&str]) -> Vec<IpNet> {
    nets.iter().filter_map(|net| net.parse().ok()).collect()
}

/// Whether a range lies in a special-purpose one, so that a rule for it leads there.
pub fn is_special(net: &IpNet) -> bool {
    SPECIAL_NETS.iter().any(|special| special.contains(net))
}

/// What an address is, whatever the policy.
#[derive(Clone, Copy, Debug)]
pub struct World<'a> {
    /// Addresses of guests.
    pub guests: Ipv4Net,
    /// Addresses of this host.
    pub own: &'a HashSet<IpAddr>,
}

impl World<'_> {
    /// No rule leads there: nowhere, many, guests, or what guests see instead of the host.
    fn never(&self, address: IpAddr) -> bool {
        let is_guest = match address {
            IpAddr::V4(v4) => self.guests.contains(&v4) || [GATEWAY, HOST, TEMPLATE].contains(&v4),
            IpAddr::V6(v6) => v6.segments()[..6] == TEMPLATE_V6.segments()[..6],
        };
        is_guest || NEVER_NETS.iter().any(|net| net.contains(&address))
    }

    /// Whether a name may lead there.
    pub fn is_public(&self, address: IpAddr) -> bool {
        !self.never(address)
            && !self.own.contains(&address)
            && !SPECIAL_NETS.iter().any(|net| net.contains(&address))
    }

    /// Whether a rule for `net` leads to `address`.
    fn leads(&self, net: &IpNet, address: IpAddr) -> bool {
        if !net.contains(&address) || self.never(address) {
            return false;
        }
        if self.own.contains(&address) && net.prefix_len() < net.max_prefix_len() {
            return false;
        }
        let mut special = SPECIAL_NETS.iter().filter(|special| special.contains(&address)).peekable();
        special.peek().is_none() || special.any(|special| special.contains(net))
    }
}

/// Where a flow would go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// By which protocol.
    pub protocol: Protocol,
    /// As the guest knows it.
    pub address: IpAddr,
    /// Port; `None` for ICMP.
    pub port: Option<u16>,
}

/// Whether, and why, a flow is allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// By its address.
    Allowed,
    /// By this name.
    AllowedAs(String),
    /// Not at all.
    Denied,
}

/// Decides over a flow. `names` are those under which the guest has resolved the address lately.
pub fn decide<'a>(
    policy: &Policy,
    world: World<'_>,
    target: Target,
    names: impl Iterator<Item = &'a str> + Clone,
) -> Verdict {
    let mut verdict = Verdict::Denied;
    for rule in policy.rules.iter().filter(|rule| covers(rule, target)) {
        match &rule.to {
            Destination::Net(net) if world.leads(net, target.address) => return Verdict::Allowed,
            Destination::Host if target.address == HOST => return Verdict::Allowed,
            Destination::Name(pattern) if world.is_public(target.address) => {
                if let Some(name) = names.clone().find(|name| matches(pattern, name)) {
                    verdict = Verdict::AllowedAs(name.to_owned());
                }
            }
            _ => {}
        }
    }
    verdict
}

fn covers(rule: &Rule, target: Target) -> bool {
    let port = |port| rule.ports.iter().any(|&(first, last)| (first..=last).contains(&port));
    rule.protocol.is_none_or(|protocol| protocol == target.protocol)
        && (rule.ports.is_empty() || target.port.is_none_or(port))
}

/// Whether a name may be asked for. It is lower case, without a final dot.
pub fn allows_name(policy: &Policy, name: &str) -> bool {
    policy.rules.iter().any(|rule| match &rule.to {
        Destination::Name(pattern) => matches(pattern, name),
        _ => false,
    })
}

fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_prefix("*.") {
        Some(parent) => name
            .strip_suffix(parent)
            .and_then(|labels| labels.strip_suffix('.'))
            .is_some_and(|l| !l.is_empty()),
        None => pattern == name,
    }
}
