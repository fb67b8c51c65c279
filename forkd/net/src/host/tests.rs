use super::*;

#[test]
fn local_addresses_are_found_and_no_others() {
    let trie = "Local:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 10.1.2.0\n        /24 link UNICAST\n     |-- 10.1.2.3\n        \
                /32 host LOCAL\n     |-- 10.1.2.255\n        /32 link BROADCAST\n";
    assert_eq!(ipv4(trie), HashSet::from(["10.1.2.3".parse().unwrap()]));
    let six = "fe800000000000000000000000000009 02 40 20 80 eth0\nnonsense\n";
    assert_eq!(ipv6(six).collect::<Vec<_>>(), ["fe80::9".parse::<IpAddr>().unwrap()]);
}

#[test]
fn this_host_has_a_loopback_address() {
    let now = Instant::now();
    assert!(HostAddresses::read(now).unwrap().at(now).contains(&"127.0.0.1".parse().unwrap()));
}
