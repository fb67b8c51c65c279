//! What nftables is told: pure text.
//!
//! Each tap has five chains: `s` checks sources before connections are tracked, `f` decides over what its guest sends, `a`
//! lets a flow pass and counts it, `d` refuses it, `t` decides over what comes for the guest. Maps from interface to chain
//! lead there, so a packet costs the same with one tap and with a thousand.
//!
//! The order in `f` is that of [`forkling_net::policy::decide`]: groups, the host's loopback, what no rule opens; single
//! addresses, which alone may be the host's; special-purpose ranges, opened only from inside of them; all else.

use std::{
    collections::HashSet,
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr},
};

use forkling_net::{
    control::{Destination, Limits, Policy, Protocol, Rule},
    policy::{NEVER, SPECIAL, is_special},
};
use forkling_proto::network::{GATEWAY, HOST, TEMPLATE, TEMPLATE_V6, ipv6_of};
use ipnet::{IpNet, Ipv4Net};

use super::Place;

/// The table in the namespace.
pub const TABLE: &str = "inet guests";

/// The interface that leads out of the namespace.
pub const UPLINK: &str = "up0";

/// What holds for all taps. `guests` is the range of their addresses.
pub fn base(guests: Ipv4Net) -> String {
    let v6_guests = IpNet::new(TEMPLATE_V6.into(), 96).expect("96 bits are possible").trunc();
    let (never4, never6) = split(NEVER.iter().map(|net| (*net).to_owned()));
    let (special4, special6) = split(SPECIAL.iter().map(|net| (*net).to_owned()));
    format!(
        "table {TABLE} {{
  set own4 {{ type ipv4_addr; }}
  set own6 {{ type ipv6_addr; }}
  set never4 {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {guests}, {GATEWAY}, {HOST}, {TEMPLATE}, {never4} }}; }}
  set never6 {{ type ipv6_addr; flags interval; auto-merge; elements = {{ {v6_guests}, {never6} }}; }}
  set special4 {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {special4} }}; }}
  set special6 {{ type ipv6_addr; flags interval; auto-merge; elements = {{ {special6} }}; }}
  map sources {{ type ifname : verdict; }}
  map from {{ type ifname : verdict; }}
  map to {{ type ifname : verdict; }}
  chain source {{
    type filter hook prerouting priority raw; policy drop;
    iifname {UPLINK} accept
    iifname vmap @sources
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    iifname vmap @from
    iifname {UPLINK} oifname vmap @to
  }}
  chain input {{ type filter hook input priority filter; policy drop; icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept; }}
  chain to-world {{ type nat hook postrouting priority srcnat; policy accept; oifname {UPLINK} masquerade; }}
  chain deny {{
    meta l4proto tcp reject with tcp reset
    reject with icmpx admin-prohibited
  }}
}}
"
    )
}

/// The host's own addresses are these from now on.
pub fn own(addresses: &HashSet<IpAddr>) -> String {
    let mut text = format!("flush set {TABLE} own4\nflush set {TABLE} own6\n");
    for address in addresses {
        let set = if address.is_ipv4() { "own4" } else { "own6" };
        let _ = writeln!(text, "add element {TABLE} {set} {{ {address} }}");
    }
    text
}

/// A new tap, which lets nothing pass.
pub fn attach(place: Place) -> String {
    let Place { number: n, ipv4 } = place;
    let ipv6 = ipv6_of(ipv4);
    let mut text = String::new();
    for chain in ["s", "f", "a", "d", "t"] {
        let _ = writeln!(text, "add chain {TABLE} {chain}{n}");
    }
    let _ = write!(
        text,
        "add rule {TABLE} s{n} ip saddr {ipv4} counter accept comment \"sent\"
add rule {TABLE} s{n} ip6 saddr {ipv6} counter accept comment \"sent\"
add rule {TABLE} s{n} counter drop comment \"refused\"
add rule {TABLE} d{n} counter comment \"denied\"
add rule {TABLE} d{n} goto deny
add rule {TABLE} f{n} goto d{n}
add rule {TABLE} t{n} counter drop comment \"dropped\"
add element {TABLE} sources {{ t{n} : goto s{n} }}
add element {TABLE} from {{ t{n} : goto f{n} }}
add element {TABLE} to {{ t{n} : goto t{n} }}
"
    );
    text
}

/// A tap that is gone.
pub fn detach(number: u32) -> String {
    let n = number;
    let mut text = String::new();
    for map in ["sources", "from", "to"] {
        let _ = writeln!(text, "delete element {TABLE} {map} {{ t{n} }}");
    }
    let chains = ["s", "f", "t", "a", "d"];
    for chain in chains {
        let _ = writeln!(text, "flush chain {TABLE} {chain}{n}");
    }
    for chain in chains {
        let _ = writeln!(text, "delete chain {TABLE} {chain}{n}");
    }
    text
}

/// A group's sets.
pub fn add_group(group: u32) -> String {
    format!(
        "add set {TABLE} g{group}v4 {{ type ipv4_addr; }}\nadd set {TABLE} g{group}v6 {{ type ipv6_addr; }}\n"
    )
}

/// A group that nobody is in, and that no chain names.
pub fn remove_group(group: u32) -> String {
    format!("delete set {TABLE} g{group}v4\ndelete set {TABLE} g{group}v6\n")
}

/// Somebody joins a group (`add`) or leaves it (`delete`).
pub fn member(verb: &str, group: u32, ipv4: Ipv4Addr) -> String {
    format!(
        "{verb} element {TABLE} g{group}v4 {{ {ipv4} }}\n{verb} element {TABLE} g{group}v6 {{ {} }}\n",
        ipv6_of(ipv4)
    )
}

/// How much a tap may pass, and counters of it.
pub fn limits(number: u32, limits: Limits) -> String {
    let n = number;
    let mut text = format!("flush chain {TABLE} a{n}\nflush chain {TABLE} t{n}\n");
    if limits.flows > 0 {
        let _ = writeln!(
            text,
            "add rule {TABLE} a{n} ct state new ct count over {} counter drop comment \"limited\"",
            limits.flows
        );
    }
    let _ = write!(
        text,
        "add rule {TABLE} a{n} ct state new ct mark set {n} counter comment \"opened\"
add rule {TABLE} a{n} accept
{}add rule {TABLE} t{n} ct state established,related counter accept comment \"received\"
add rule {TABLE} t{n} counter drop comment \"dropped\"
",
        rate("t", n, bytes(limits))
    );
    text
}

/// What a tap's guest may reach.
pub fn policy(number: u32, policy: &Policy, limits: Limits, group: Option<u32>) -> String {
    let n = number;
    let mut text = format!("flush chain {TABLE} f{n}\n");
    text += &rate("f", n, bytes(limits));
    text += &rate("f", n, units(limits.frames_per_s.into(), "packets"));
    if let Some(group) = group {
        // From its members, too: what they answer is theirs to send.
        let _ = writeln!(text, "add rule {TABLE} f{n} ip daddr @g{group}v4 goto a{n}");
        let _ = writeln!(text, "add rule {TABLE} f{n} ip6 daddr @g{group}v6 goto a{n}");
    }
    let _ = writeln!(text, "add rule {TABLE} f{n} oifname != {UPLINK} goto d{n}");
    let mut add = |matching: &str| {
        let _ = writeln!(text, "add rule {TABLE} f{n} {matching}");
    };
    for rule in policy.rules.iter().filter(|rule| rule.to == Destination::Host) {
        covers(rule, false).for_each(|what| add(&format!("ip daddr {HOST} {what} goto a{n}")));
    }
    if policy.rules.iter().any(|rule| matches!(rule.to, Destination::Name(_))) {
        let queries = format!("ip daddr {GATEWAY} meta l4proto {{ tcp, udp }} th dport 53");
        if limits.names_per_s > 0 {
            let over = units(limits.names_per_s.into(), "packets").unwrap_or_default();
            add(&format!("{queries} {over} counter drop comment \"limited\""));
        }
        add(&format!("{queries} goto a{n}"));
    }
    let refuse =
        |set: &str| format!("ip daddr @{set}4 goto d{n}\nadd rule {TABLE} f{n} ip6 daddr @{set}6 goto d{n}");
    add(&refuse("never"));
    let nets = |wanted: fn(&IpNet) -> bool| {
        let net = move |rule: &Rule| match rule.to {
            Destination::Net(net) if wanted(&net) => Some(net),
            _ => None,
        };
        policy.rules.iter().filter_map(move |rule| Some((rule, net(rule)?)))
    };
    let open = |wanted: fn(&IpNet) -> bool, add: &mut dyn FnMut(&str)| {
        for (rule, net) in nets(wanted) {
            let (family, v6) = if net.addr().is_ipv4() { ("ip", false) } else { ("ip6", true) };
            covers(rule, v6).for_each(|what| add(&format!("{family} daddr {net} {what} goto a{n}")));
        }
    };
    open(|net| net.prefix_len() == net.max_prefix_len(), &mut add);
    add(&refuse("own"));
    open(|net| net.prefix_len() < net.max_prefix_len() && is_special(net), &mut add);
    add(&refuse("special"));
    open(|net| net.prefix_len() < net.max_prefix_len() && !is_special(net), &mut add);
    add(&format!("goto d{n}"));
    text
}

/// What is to be listed for a tap's counters. One call each: nft 1.0.6 finds only the last of several chains.
pub fn counters(number: u32) -> [String; 5] {
    ["s", "f", "a", "d", "t"].map(|chain| format!("list chain {TABLE} {chain}{number}"))
}

/// What of a destination a rule covers.
fn covers(rule: &Rule, v6: bool) -> impl Iterator<Item = String> {
    let echo = if v6 { "icmpv6 type echo-request" } else { "icmp type echo-request" };
    let ports: Vec<_> = rule.ports.iter().map(|(first, last)| format!("{first}-{last}")).collect();
    let ports =
        if ports.is_empty() { String::new() } else { format!(" th dport {{ {} }}", ports.join(", ")) };
    let flows = match rule.protocol {
        Some(Protocol::Tcp) => Some("meta l4proto tcp"),
        Some(Protocol::Udp) => Some("meta l4proto udp"),
        Some(Protocol::Icmp) => None,
        None => Some("meta l4proto { tcp, udp }"),
    };
    let echo = matches!(rule.protocol, None | Some(Protocol::Icmp)).then(|| echo.to_owned());
    flows.map(|flows| format!("{flows}{ports}")).into_iter().chain(echo)
}

fn bytes(limits: Limits) -> Option<String> {
    units(limits.bytes_per_s, "bytes")
}

/// A burst of a second, but never less than the longest packet, which could not pass otherwise.
fn units(per_second: u64, unit: &str) -> Option<String> {
    const LONGEST: u64 = 65_536;
    if per_second == 0 {
        return None;
    }
    let burst = per_second.min(u32::MAX.into());
    Some(match unit {
        "bytes" => {
            format!("limit rate over {per_second} bytes/second burst {} bytes", burst.max(LONGEST))
        }
        _ => format!("limit rate over {per_second}/second burst {burst} packets"),
    })
}

fn rate(chain: &str, n: u32, over: Option<String>) -> String {
    over.map_or_else(String::new, |over| {
        format!("add rule {TABLE} {chain}{n} {over} counter drop comment \"dropped\"\n")
    })
}

/// Lists for nftables of IPv4 and IPv6 ranges.
fn split(nets: impl Iterator<Item = String>) -> (String, String) {
    let (v6, v4): (Vec<_>, Vec<_>) = nets.partition(|net| net.contains(':'));
    (v4.join(", "), v6.join(", "))
}

#[cfg(test)]
mod tests;
