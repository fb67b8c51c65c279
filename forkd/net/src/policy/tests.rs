use super::*;

fn own() -> HashSet<IpAddr> {
    ["192.168.7.7", "8.8.4.4", "2a00::7", "127.0.0.1"].iter().map(|a| a.parse().unwrap()).collect()
}

fn rule(to: Destination) -> Rule {
    Rule { to, protocol: None, ports: vec![] }
}

fn net(text: &str) -> Destination {
    Destination::Net(text.parse().unwrap())
}

fn verdict(rules: Vec<Rule>, protocol: Protocol, address: &str, port: u16, names: &[&str]) -> Verdict {
    let own = own();
    let world = World { guests: "100.100.0.0/16".parse().unwrap(), own: &own };
    let port = (protocol != Protocol::Icmp).then_some(port);
    let target = Target { protocol, address: address.parse().unwrap(), port };
    decide(&Policy { rules }, world, target, names.iter().copied())
}

fn by_net(rules: &[&str], address: &str) -> bool {
    verdict(rules.iter().map(|r| rule(net(r))).collect(), Protocol::Tcp, address, 80, &[]) != Verdict::Denied
}

#[test]
fn nothing_is_allowed_by_default() {
    assert_eq!(verdict(vec![], Protocol::Tcp, "1.1.1.1", 443, &["a.b"]), Verdict::Denied);
}

#[test]
fn every_table_entry_is_a_range() {
    assert_eq!((NEVER_NETS.len(), SPECIAL_NETS.len()), (NEVER.len(), SPECIAL.len()));
}

#[test]
fn everything_is_not_everything() {
    let all = ["0.0.0.0/0", "::/0", "0.0.0.0/1", "128.0.0.0/1"];
    for public in ["1.1.1.1", "9.9.9.9", "172.32.0.1", "2a00::1", "2606:4700::1"] {
        assert!(by_net(&all, public), "{public}");
    }
    for special in [
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "100.64.0.1",
        "100.127.255.255",
        "127.0.0.1",
        "127.9.9.9",
        "169.254.169.254",
        "169.254.1.1",
        "169.254.1.2",
        "169.254.1.3",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.8",
        "192.168.0.1",
        "168.63.129.16",
        "198.18.0.1",
        "224.0.0.1",
        "239.1.1.1",
        "240.0.0.1",
        "255.255.255.255",
        "100.100.0.9",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "::ffff:1.1.1.1",
        "64:ff9b::a00:1",
        "64:ff9b:1::1",
        "2001::1",
        "2001:db8::1",
        "2002:a00:1::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fec0::1",
        "ff02::1",
        "fd66:6f72:6b6c::6464:9",
        "192.168.7.7",
        "8.8.4.4",
        "2a00::7",
    ] {
        assert!(!by_net(&all, special), "{special}");
    }
}

#[test]
fn special_ranges_are_opened_by_rules_within_them() {
    assert!(by_net(&["10.0.0.0/8"], "10.1.2.3"));
    assert!(by_net(&["10.1.0.0/16"], "10.1.2.3"));
    assert!(!by_net(&["10.0.0.0/7"], "10.1.2.3"));
    assert!(!by_net(&["10.2.0.0/16"], "10.1.2.3"));
    assert!(by_net(&["169.254.169.254/32"], "169.254.169.254"));
    assert!(by_net(&["fd00::/8"], "fd12::1"));
    assert!(by_net(&["64:ff9b::/96"], "64:ff9b::1"));
    for never in ["127.0.0.1", "224.0.0.1", "0.0.0.0", "::1", "::ffff:10.0.0.1", "fe80::1", "100.100.0.9"] {
        let bits = if never.contains(':') { 128 } else { 32 };
        assert!(!by_net(&[&format!("{never}/{bits}")], never), "{never}");
    }
}

#[test]
fn addresses_of_this_host_are_opened_one_by_one() {
    assert!(!by_net(&["192.168.7.0/24"], "192.168.7.7"));
    assert!(by_net(&["192.168.7.7/32"], "192.168.7.7"));
    assert!(by_net(&["192.168.7.0/24"], "192.168.7.8"));
    assert!(!by_net(&["8.8.0.0/16"], "8.8.4.4"));
    assert!(by_net(&["8.8.4.4/32"], "8.8.4.4"));
    assert!(by_net(&["2a00::7/128"], "2a00::7"));
}

#[test]
fn protocols_and_ports_narrow_a_rule() {
    let rules =
        |protocol, ports: &[(u16, u16)]| vec![Rule { to: net("1.0.0.0/8"), protocol, ports: ports.to_vec() }];
    let allowed = |rules, protocol, port| verdict(rules, protocol, "1.1.1.1", port, &[]) == Verdict::Allowed;
    assert!(allowed(rules(Some(Protocol::Tcp), &[(80, 80), (400, 500)]), Protocol::Tcp, 443));
    assert!(!allowed(rules(Some(Protocol::Tcp), &[(80, 80), (400, 500)]), Protocol::Tcp, 399));
    assert!(!allowed(rules(Some(Protocol::Tcp), &[]), Protocol::Udp, 443));
    assert!(!allowed(rules(Some(Protocol::Tcp), &[]), Protocol::Icmp, 0));
    assert!(allowed(rules(None, &[(80, 80)]), Protocol::Icmp, 0));
    assert!(allowed(rules(Some(Protocol::Udp), &[(0, 65535)]), Protocol::Udp, 65535));
}

#[test]
fn the_host_is_opened_by_its_own_rule_only() {
    let host = HOST.to_string();
    assert_eq!(verdict(vec![rule(Destination::Host)], Protocol::Tcp, &host, 1, &[]), Verdict::Allowed);
    assert!(!by_net(&["169.254.1.2/32"], &host));
    assert_eq!(verdict(vec![rule(Destination::Host)], Protocol::Tcp, "127.0.0.1", 1, &[]), Verdict::Denied);
}

#[test]
fn a_name_opens_public_addresses_it_was_given_for() {
    let rules =
        || vec![rule(Destination::Name("a.example".into())), rule(Destination::Name("*.b.example".into()))];
    let by = |address, names: &[&str]| verdict(rules(), Protocol::Tcp, address, 80, names);
    assert_eq!(by("1.1.1.1", &["a.example"]), Verdict::AllowedAs("a.example".into()));
    assert_eq!(by("1.1.1.1", &["c", "x.y.b.example"]), Verdict::AllowedAs("x.y.b.example".into()));
    assert_eq!(by("1.1.1.1", &[]), Verdict::Denied);
    assert_eq!(by("1.1.1.1", &["c.example"]), Verdict::Denied);
    for private in
        ["10.0.0.1", "127.0.0.1", "192.168.7.7", "8.8.4.4", "169.254.1.2", "::ffff:1.1.1.1", "fd00::1"]
    {
        assert_eq!(by(private, &["a.example"]), Verdict::Denied, "{private}");
    }
}

#[test]
fn wildcards_stand_for_labels() {
    let policy =
        Policy { rules: vec![rule(Destination::Name("*.b.c".into())), rule(Destination::Name("x".into()))] };
    for yes in ["a.b.c", "z.a.b.c", "x"] {
        assert!(allows_name(&policy, yes), "{yes}");
    }
    for no in ["b.c", ".b.c", "ab.c", "zb.c", "a.b.c.d", "y", "a.x", ""] {
        assert!(!allows_name(&policy, no), "{no}");
    }
}
