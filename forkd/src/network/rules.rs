//! What a fork may reach, as callers write it.
//!
//! `[tcp://|udp://|icmp://]DESTINATION[:PORTS]`, where DESTINATION is an address or CIDR (IPv6 in brackets if ports
//! follow), a domain name, `*.` and a domain name, `host` for the host's loopback, or `internet` for every public
//! address and every name; PORTS are numbers and ranges with commas between them.

use std::net::IpAddr;

use forkling_net::control::{Destination, Policy, Protocol, Rule};
use ipnet::IpNet;

/// Most rules of a policy.
pub const MAX_RULES: usize = 256;

/// Longest domain name in characters (RFC 1035, 2.3.4, without the final dot).
const MAX_NAME: usize = 253;

/// Why a rule cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Neither address nor name.
    #[error("{0:?} is no address, CIDR, domain name, `host` or `internet`")]
    Destination(String),
    /// Bits are set beyond the prefix.
    #[error("{given} has bits beyond its prefix; write {meant}")]
    HostBits {
        /// As given.
        given: String,
        /// What may have been meant.
        meant: IpNet,
    },
    /// Not ports.
    #[error("{0:?} is not a list of ports from 1 to 65535, such as 443 or 80,8000-8010")]
    Ports(String),
    /// Ports of a protocol without ports.
    #[error("{0:?} names ports, which ICMP does not have")]
    IcmpPorts(String),
    /// Too many rules.
    #[error("{0} rules are more than {MAX_RULES}")]
    TooMany(usize),
}

/// The policy that `rules` say.
pub fn parse(rules: &[String]) -> Result<Policy, Error> {
    if rules.len() > MAX_RULES {
        return Err(Error::TooMany(rules.len()));
    }
    let mut policy = Policy::default();
    for text in rules {
        policy.rules.extend(rule(text)?);
    }
    Ok(policy)
}

fn rule(text: &str) -> Result<Vec<Rule>, Error> {
    let protocols = [("tcp://", Protocol::Tcp), ("udp://", Protocol::Udp), ("icmp://", Protocol::Icmp)];
    let prefixed =
        protocols.iter().find_map(|(prefix, protocol)| Some((*protocol, text.strip_prefix(prefix)?)));
    let (protocol, rest) = prefixed.map_or((None, text), |(protocol, rest)| (Some(protocol), rest));
    let (to, ports) = split(rest).ok_or_else(|| Error::Destination(rest.to_owned()))?;
    let ports = ports.map(list).transpose()?.unwrap_or_default();
    if protocol == Some(Protocol::Icmp) && !ports.is_empty() {
        return Err(Error::IcmpPorts(text.to_owned()));
    }
    let rule = |to| Rule { to, protocol, ports: ports.clone() };
    Ok(destinations(to)?.into_iter().map(rule).collect())
}

/// Destination and ports.
fn split(text: &str) -> Option<(&str, Option<&str>)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (inside, after) = rest.split_once(']')?;
        return match after.strip_prefix(':') {
            Some(ports) => Some((inside, Some(ports))),
            None => after.is_empty().then_some((inside, None)),
        };
    }
    match text.split_once(':') {
        // More than one colon: IPv6.
        Some((_, ports)) if ports.contains(':') => Some((text, None)),
        Some((to, ports)) => Some((to, Some(ports))),
        None => Some((text, None)),
    }
}

fn destinations(text: &str) -> Result<Vec<Destination>, Error> {
    let everything = |net: &str| Destination::Net(net.parse().expect("a constant"));
    match text {
        "host" => return Ok(vec![Destination::Host]),
        "internet" => {
            let every_name = Destination::Name("*".to_owned());
            return Ok(vec![everything("0.0.0.0/0"), everything("::/0"), every_name]);
        }
        _ => {}
    }
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(vec![Destination::Net(address.into())]);
    }
    if let Ok(net) = text.parse::<IpNet>() {
        if net.trunc() != net {
            return Err(Error::HostBits { given: text.to_owned(), meant: net.trunc() });
        }
        return Ok(vec![Destination::Net(net)]);
    }
    let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    if !is_name(name.strip_prefix("*.").unwrap_or(&name)) {
        return Err(Error::Destination(text.to_owned()));
    }
    Ok(vec![Destination::Name(name)])
}

/// Whether `name` is a domain name with at least two labels that cannot be taken for an address.
fn is_name(name: &str) -> bool {
    let is_label = |label: &str| {
        let sound = label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
        (1..=63).contains(&label.len()) && sound && !label.starts_with('-') && !label.ends_with('-')
    };
    let numeric = name.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
    name.len() <= MAX_NAME && name.contains('.') && name.split('.').all(is_label) && !numeric
}

fn list(text: &str) -> Result<Vec<(u16, u16)>, Error> {
    let port = |text: &str| text.parse().ok().filter(|&port: &u16| port != 0);
    let range = |text: &str| match text.split_once('-') {
        Some((first, last)) => Some((port(first)?, port(last)?)).filter(|(first, last)| first <= last),
        None => port(text).map(|port| (port, port)),
    };
    text.split(',').map(|part| range(part).ok_or_else(|| Error::Ports(text.to_owned()))).collect()
}

#[cfg(test)]
mod tests;
