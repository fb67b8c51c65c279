use super::*;

fn one(text: &str) -> Rule {
    let mut policy = parse(&[text.to_owned()]).unwrap();
    assert_eq!(policy.rules.len(), 1, "{text}");
    policy.rules.remove(0)
}

fn refused(text: &str) -> Error {
    parse(&[text.to_owned()]).unwrap_err()
}

#[test]
fn rules_are_read() {
    let net = |text: &str| Destination::Net(text.parse().unwrap());
    let name = |text: &str| Destination::Name(text.to_owned());
    let cases = [
        ("192.0.2.1", net("192.0.2.1/32"), None, vec![]),
        ("192.0.2.0/24:443", net("192.0.2.0/24"), None, vec![(443, 443)]),
        (
            "tcp://192.0.2.7:80,8000-8010",
            net("192.0.2.7/32"),
            Some(Protocol::Tcp),
            vec![(80, 80), (8000, 8010)],
        ),
        ("2001:db8::1", net("2001:db8::1/128"), None, vec![]),
        ("udp://[2001:db8::/32]:53", net("2001:db8::/32"), Some(Protocol::Udp), vec![(53, 53)]),
        ("icmp://198.51.100.1", net("198.51.100.1/32"), Some(Protocol::Icmp), vec![]),
        ("Example.COM.:443", name("example.com"), None, vec![(443, 443)]),
        ("*.pypi.org", name("*.pypi.org"), None, vec![]),
        ("host:8080", Destination::Host, None, vec![(8080, 8080)]),
    ];
    for (text, to, protocol, ports) in cases {
        assert_eq!(one(text), Rule { to, protocol, ports }, "{text}");
    }
    let internet = parse(&["tcp://internet:443".to_owned()]).unwrap().rules;
    assert_eq!(internet.len(), 3);
    assert!(internet.iter().all(|rule| rule.ports == [(443, 443)] && rule.protocol == Some(Protocol::Tcp)));
}

#[test]
fn what_is_no_rule_is_refused_by_name() {
    for text in [
        "",
        "localhost",
        "300.1.2.3",
        "exa mple.com",
        "-a.com",
        "a..com",
        "*.",
        "*",
        "*.com*",
        "[::1",
        "http://a.com",
    ] {
        assert!(matches!(refused(text), Error::Destination(_) | Error::Ports(_)), "{text}");
    }
    for text in ["a.com:0", "a.com:", "a.com:70000", "a.com:9-8", "a.com:80,", "a.com:http"] {
        assert!(matches!(refused(text), Error::Ports(_)), "{text}");
    }
    assert_eq!(
        refused("10.0.0.1/8"),
        Error::HostBits { given: "10.0.0.1/8".to_owned(), meant: "10.0.0.0/8".parse().unwrap() }
    );
    assert!(matches!(refused("icmp://192.0.2.1:7"), Error::IcmpPorts(_)));
    assert!(matches!(parse(&vec!["a.com".to_owned(); MAX_RULES + 1]), Err(Error::TooMany(257))));
    assert!(matches!(refused(&format!("{}.com", "a".repeat(64))), Error::Destination(_)));
}
