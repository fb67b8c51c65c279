//! The text that nft gets. What it means to the kernel is tested with guests (tests/debian/tap.rs).

use super::*;

fn policy_of(rules: &[&str]) -> Policy {
    let rules: Vec<String> = rules.iter().map(|rule| (*rule).to_owned()).collect();
    crate::network::rules::parse(&rules).unwrap()
}

/// The chain of tap 3 under these rules.
fn chain(rules: &[&str]) -> Vec<String> {
    let text = policy(3, &policy_of(rules), Limits { names_per_s: 0, ..Limits::default() }, None);
    text.lines().map(|line| line.replace(&format!("add rule {TABLE} f3 "), "")).collect()
}

fn place(lines: &[String], line: &str) -> usize {
    lines.iter().position(|other| other == line).unwrap_or_else(|| panic!("no {line:?} in {lines:#?}"))
}

#[test]
fn without_rules_nothing_is_let_through() {
    let lines = chain(&[]);
    assert!(lines.iter().all(|line| !line.contains("goto a3")), "{lines:#?}");
    assert_eq!(lines.last().unwrap(), "goto d3");
}

#[test]
fn each_kind_of_destination_stands_behind_what_it_cannot_open() {
    let lines = chain(&["tcp://10.0.0.0/8:80", "192.0.0.0/2", "tcp://10.1.1.1:22", "udp://host:53"]);
    let order = [
        "ip daddr 169.254.1.2 meta l4proto udp th dport { 53-53 } goto a3",
        "ip daddr @never4 goto d3",
        "ip daddr 10.1.1.1/32 meta l4proto tcp th dport { 22-22 } goto a3",
        "ip daddr @own4 goto d3",
        "ip daddr 10.0.0.0/8 meta l4proto tcp th dport { 80-80 } goto a3",
        "ip daddr @special4 goto d3",
        "ip daddr 192.0.0.0/2 meta l4proto { tcp, udp } goto a3",
        "ip daddr 192.0.0.0/2 icmp type echo-request goto a3",
        "goto d3",
    ];
    let places: Vec<_> = order.iter().map(|line| place(&lines, line)).collect();
    assert!(places.is_sorted(), "{lines:#?}");
}

#[test]
fn ipv6_is_another_family() {
    let lines = chain(&["icmp://2001:db8::/32", "[2606:4700::1]:443,8000-8010"]);
    place(&lines, "ip6 daddr 2001:db8::/32 icmpv6 type echo-request goto a3");
    place(
        &lines,
        "ip6 daddr 2606:4700::1/128 meta l4proto { tcp, udp } th dport { 443-443, 8000-8010 } goto a3",
    );
    place(&lines, "ip6 daddr @own6 goto d3");
}

#[test]
fn the_resolver_is_reached_by_who_may_ask_for_every_name() {
    let queries = "ip daddr 169.254.1.1 meta l4proto { tcp, udp } th dport 53 goto a3";
    place(&chain(&["internet"]), queries);
    assert!(!chain(&["0.0.0.0/0", "::/0"]).iter().any(|line| line == queries));
}

#[test]
fn limits_of_zero_are_none() {
    let none = Limits { flows: 0, bytes_per_s: 0, frames_per_s: 0, names_per_s: 0 };
    let text = limits(3, none) + &policy(3, &policy_of(&["internet"]), none, None);
    assert!(!text.contains("limit rate") && !text.contains("ct count"), "{text}");
    let some = Limits { flows: 5, bytes_per_s: 1000, frames_per_s: 7, names_per_s: 9 };
    let text = limits(3, some) + &policy(3, &policy_of(&["internet"]), some, None);
    let rate = "limit rate over 1000 bytes/second burst 65536 bytes";
    assert_eq!(text.matches(rate).count(), 2, "each way: {text}");
    for limit in ["ct count over 5 ", "limit rate over 7/second", "limit rate over 9/second"] {
        assert_eq!(text.matches(limit).count(), 1, "{limit}: {text}");
    }
}

#[test]
fn what_is_attached_is_detached() {
    let tap = Place { number: 9, ipv4: Ipv4Addr::new(100, 64, 0, 7) };
    let (added, removed) = (attach(tap), detach(9));
    let of = |text: &str, verb: &str, kind: &str| {
        let lines = text.lines().filter(|line| line.starts_with(&format!("{verb} {kind} ")));
        let mut names: Vec<_> = lines.map(|line| line.split(' ').nth(4).unwrap().to_owned()).collect();
        names.sort();
        names
    };
    for kind in ["chain", "element"] {
        assert!(!of(&added, "add", kind).is_empty());
        assert_eq!(of(&added, "add", kind), of(&removed, "delete", kind));
    }
    assert!(added.contains("ip saddr 100.64.0.7 ") && added.contains("ip6 saddr fd66:6f72:6b6c::6440:7 "));
}

#[test]
fn every_range_of_the_policy_is_in_the_base() {
    let text = base("100.64.0.0/10".parse().unwrap());
    for net in NEVER.iter().chain(&SPECIAL) {
        assert!(text.contains(net), "{net}");
    }
}
