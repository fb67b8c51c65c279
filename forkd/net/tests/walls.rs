//! Ways out that must be none, and frames that must do no harm.

mod guest;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    thread,
    time::Duration,
};

use forkling_net::control::{FromNet, Limits, Membership, ToNet};
use forkling_proto::network::{
    GATEWAY, GATEWAY_MAC, GATEWAY_V6, HOST, TEMPLATE, TEMPLATE_V6, ipv6_of, mac_of,
};
use guest::{Guest, Net, checksum, host_rule, ipv4_frame, ipv6_frame, name_rule, net_rule, pattern, segment};

const SOON: Duration = Duration::from_secs(5);
const SILENCE: Duration = Duration::from_millis(200);
const PUBLIC: Ipv4Addr = Ipv4Addr::new(1, 1, 1, 1);

fn ping(to: Ipv4Addr, guest: &Guest, data: &[u8]) -> Vec<u8> {
    let mut icmp = [&[8, 0, 0, 0, 1, 2, 0, 1], data].concat();
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum);
    guest.frame(guest.ipv4, to, 1, &icmp)
}

/// Whether the gateway answers an echo request with the same data.
fn is_alive(guest: &Guest) -> bool {
    let data = pattern(1000);
    guest.raw(&ping(GATEWAY, guest, &data));
    guest.hear(SOON, |frame| (frame[12..14] == [8, 0] && frame.ends_with(&data)).then_some(())).is_some()
}

/// Flags of the TCP segment that answers.
fn hear_tcp(guest: &Guest, patience: Duration) -> Option<u8> {
    guest.hear(patience, |frame| (frame[12..14] == [8, 0] && frame[23] == 6).then(|| frame[47]))
}

/// Type and code of the ICMP packet that answers.
fn hear_icmp(guest: &Guest) -> Option<(u8, u8)> {
    guest.hear(SOON, |frame| (frame[12..14] == [8, 0] && frame[23] == 1).then(|| (frame[34], frame[35])))
}

#[test]
fn the_gateway_answers_for_itself_and_the_host() {
    let net = Net::start(vec![]);
    let guest = net.guest(2, vec![host_rule()]);
    assert!(is_alive(&guest));
    guest.raw(&ping(HOST, &guest, b"host"));
    assert_eq!(hear_icmp(&guest), Some((0, 0)));
    let arp =
        [&[0xff; 6][..], &mac_of(guest.ipv4), &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &mac_of(guest.ipv4)].concat();
    guest.raw(&[&arp[..], &guest.ipv4.octets(), &[0; 6], &GATEWAY.octets()].concat());
    let answer = guest.hear(SOON, |frame| (frame[12..14] == [8, 6]).then(|| frame.to_vec())).unwrap();
    assert_eq!(
        (&answer[20..22], &answer[22..28], &answer[28..32]),
        (&[0, 2][..], &GATEWAY_MAC[..], &GATEWAY.octets()[..])
    );
}

#[test]
fn datagrams_go_and_come_back() {
    let echo = UdpSocket::bind("127.0.0.1:0").unwrap();
    let to = SocketAddr::from((HOST, echo.local_addr().unwrap().port()));
    thread::spawn(move || {
        let mut buffer = vec![0; 70_000];
        while let Ok((length, from)) = echo.recv_from(&mut buffer) {
            echo.send_to(&buffer[..length], from).unwrap();
        }
    });
    let net = Net::start(vec![]);
    let guest = net.guest(2, vec![host_rule()]);
    for length in [0, 1, 1400, 65_000] {
        let data = pattern(length);
        assert!(guest.exchange(9, to, &data, SOON) == Some(data), "{length} bytes");
    }
    assert_eq!(net.report(&guest).counters.flows, 1);
    let closed = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    guest.raw(&guest.datagram(9, (HOST, closed).into(), b"x"));
    assert_eq!(hear_icmp(&guest), Some((3, 3)));
}

#[test]
fn nothing_is_reached_without_a_rule() {
    let net = Net::start(vec![]);
    let guest = net.guest(2, vec![name_rule("a.example")]);
    guest.raw(&guest.datagram(9, ([8, 8, 8, 8], 53).into(), b"raw dns"));
    assert_eq!(hear_icmp(&guest), Some((3, 13)), "names elsewhere");
    guest.raw(&guest.frame(guest.ipv4, PUBLIC, 6, &segment(9, 443, 2)));
    assert_eq!(hear_tcp(&guest, SOON), Some(0x14), "an address that was never resolved");
    guest.raw(&ping(PUBLIC, &guest, b"smuggled"));
    assert_eq!(hear_icmp(&guest), Some((3, 13)));
    guest.raw(&guest.frame(guest.ipv4, PUBLIC, 47, b"a tunnel"));
    assert_eq!(hear_icmp(&guest), Some((3, 13)));
    guest.raw(&guest.frame(guest.ipv4, GATEWAY, 6, &segment(9, 80, 2)));
    assert_eq!(hear_tcp(&guest, SOON), Some(0x14), "another port of the gateway");
    let denied: Vec<_> =
        net.denied(&guest).into_iter().map(|(what, _, address, port)| (what, address, port)).collect();
    let public = Some(IpAddr::from(PUBLIC));
    assert_eq!(
        denied,
        [
            ("udp".into(), Some([8, 8, 8, 8].into()), Some(53)),
            ("tcp".into(), public, Some(443)),
            ("icmp".into(), public, None),
            ("47".into(), public, None),
            ("tcp".into(), Some(GATEWAY.into()), Some(80)),
        ]
    );
    assert_eq!(net.report(&guest).counters.flows_opened, 0);
}

#[test]
fn rules_for_everything_do_not_open_what_is_private() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let net = Net::start(vec![]);
    let guest = net.guest(2, vec![net_rule("0.0.0.0/0"), net_rule("::/0")]);
    for to in [
        [127, 0, 0, 1],
        [169, 254, 169, 254],
        [10, 0, 0, 1],
        [169, 254, 1, 2],
        [0, 0, 0, 0],
        [100, 100, 0, 9],
    ] {
        guest.raw(&guest.frame(guest.ipv4, to.into(), 6, &segment(9, port, 2)));
        assert_eq!(hear_tcp(&guest, SOON), Some(0x14), "{to:?}");
    }
    assert_eq!(net.report(&guest).counters.denied, 6);
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err());
}

/// Puts the checksum of an ICMPv6 packet into its frame.
fn seal_icmpv6(mut frame: Vec<u8>) -> Vec<u8> {
    let length = frame.len() - 54;
    let pseudo = [&frame[22..54], &(length as u32).to_be_bytes(), &[0, 0, 0, 58], &frame[54..]].concat();
    frame[56..58].copy_from_slice(&checksum(&pseudo));
    frame
}

#[test]
fn ipv6_is_no_way_around() {
    let net = Net::start(vec![]);
    let guest = net.guest(2, vec![net_rule("::/0")]);
    let own = ipv6_of(guest.ipv4);
    let targets = [
        "::1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001::1",
        "fd00:ec2::254",
        "::127.0.0.1",
    ];
    for to in targets {
        guest.raw(&ipv6_frame(&guest, own, to.parse().unwrap(), 6, &segment(9, 80, 2)));
        let reset =
            guest.hear(SOON, |frame| (frame[12..14] == [0x86, 0xdd] && frame[20] == 6).then(|| frame[67]));
        assert_eq!(reset, Some(0x14), "{to}");
    }
    assert_eq!(net.report(&guest).counters.denied, targets.len() as u64);
    assert_eq!(net.report(&guest).counters.flows_opened, 0);
    guest.raw(&ipv6_frame(
        &guest,
        "2a00::1".parse().unwrap(),
        PUBLIC.to_ipv6_mapped(),
        6,
        &segment(9, 80, 2),
    ));
    net.await_report(&guest, |report| report.denials.last().is_some_and(|denial| denial.what == "source"));
    guest.raw(&ipv6_frame(&guest, own, "2a00::1".parse().unwrap(), 44, &[0; 16]));
    net.await_report(&guest, |report| report.denials.last().is_some_and(|denial| denial.what == "fragment"));
}

#[test]
fn the_gateway_is_a_neighbour_and_answers_by_ipv6() {
    let net = Net::start(vec![]);
    let guest = net.guest(2, vec![]);
    let own = ipv6_of(guest.ipv4);
    let all: std::net::Ipv6Addr = "ff02::1:ff00:1".parse().unwrap();
    let sought =
        [&[135, 0, 0, 0, 0, 0, 0, 0][..], &GATEWAY_V6.octets(), &[1, 1], &mac_of(guest.ipv4)].concat();
    guest.raw(&seal_icmpv6(ipv6_frame(&guest, own, all, 58, &sought)));
    let answer =
        guest.hear(SOON, |frame| (frame[20] == 58 && frame[54] == 136).then(|| frame.to_vec())).unwrap();
    assert_eq!((&answer[62..78], &answer[80..86]), (&GATEWAY_V6.octets()[..], &GATEWAY_MAC[..]));
    guest.raw(&seal_icmpv6(ipv6_frame(&guest, own, GATEWAY_V6, 58, b"\x80\0\0\0\0\x01\0\x01ping")));
    assert!(guest.hear(SOON, |frame| (frame[20] == 58 && frame[54] == 129).then_some(())).is_some());
}

#[test]
fn nobody_speaks_for_another() {
    let net = Net::start(vec![]);
    let member = || Some(Membership { group: "g".into(), names: vec![] });
    let one = net.guest_with(2, vec![net_rule("1.0.0.0/8")], member(), Limits::default());
    let two = net.guest_with(3, vec![], member(), Limits::default());
    one.raw(&one.frame(two.ipv4, PUBLIC, 17, &guest::udp(9, 9, b"x")));
    one.raw(&one.frame([9, 9, 9, 9].into(), two.ipv4, 17, &guest::udp(9, 9, b"x")));
    one.raw(&ipv4_frame(mac_of(two.ipv4), one.ipv4, two.ipv4, 17, &guest::udp(9, 9, b"x")));
    let report = net.await_report(&one, |report| report.counters.frames_refused == 3);
    assert!(report.denials.iter().all(|denial| denial.what == "source"));
    assert_eq!((report.denials.len(), report.counters.flows_opened), (3, 0));
    assert_eq!(two.hear(SILENCE, |_| Some(())), None);
}

#[test]
fn connections_from_before_the_fork_are_reset() {
    let net = Net::start(vec![]);
    let guest = net.guest(2, vec![host_rule()]);
    guest.raw(&guest.frame(TEMPLATE, PUBLIC, 6, &segment(9, 443, 0x10)));
    assert_eq!(hear_tcp(&guest, SOON), Some(4));
    guest.raw(&ipv6_frame(&guest, TEMPLATE_V6, "2a00::1".parse().unwrap(), 6, &segment(9, 443, 0x10)));
    assert!(
        guest.hear(SOON, |frame| (frame[12..14] == [0x86, 0xdd] && frame[67] == 4).then_some(())).is_some()
    );
    assert_eq!(net.report(&guest).counters.denied, 0);
}

#[test]
fn a_template_that_is_built_is_a_guest_like_any_other() {
    let net = Net::start(vec![]);
    let templates =
        [1, 2].map(|link| net.guest_at(link, TEMPLATE, vec![host_rule()], None, Limits::default()));
    assert!(templates.iter().all(is_alive));
    let echo = UdpSocket::bind("127.0.0.1:0").unwrap();
    for template in &templates {
        template.raw(&template.datagram(9, (HOST, echo.local_addr().unwrap().port()).into(), b"x"));
        assert_eq!(echo.recv(&mut [0; 9]).unwrap(), 1);
    }
}

#[test]
fn groups_reach_each_other_and_nobody_else() {
    let net = Net::start(vec![]);
    let member = |group: &str| Some(Membership { group: group.into(), names: vec![] });
    let one = net.guest_with(2, vec![], member("red"), Limits::default());
    let two = net.guest_with(3, vec![], member("red"), Limits::default());
    let blue = net.guest_with(4, vec![], member("blue"), Limits::default());
    let alone =
        net.guest(5, vec![net_rule("0.0.0.0/0"), net_rule("100.100.0.0/16"), net_rule("100.100.0.3/32")]);
    let data = pattern(60_000);
    one.raw(&one.datagram(9, (two.ipv4, 7).into(), &data));
    let frame = two.hear(SOON, |frame| (frame[12..14] == [8, 0]).then(|| frame.to_vec())).unwrap();
    assert_eq!((&frame[..6], &frame[6..12]), (&mac_of(two.ipv4)[..], &GATEWAY_MAC[..]));
    assert!(frame.ends_with(&data));
    two.raw(&ipv6_frame(&two, ipv6_of(two.ipv4), ipv6_of(one.ipv4), 17, &guest::udp(7, 9, b"back")));
    assert!(one.hear(SOON, |frame| frame.ends_with(b"back").then_some(())).is_some());
    for outsider in [&blue, &alone] {
        outsider.raw(&outsider.datagram(9, (two.ipv4, 7).into(), b"x"));
        assert_eq!(hear_icmp(outsider), Some((3, 13)));
        outsider.raw(&ipv6_frame(
            outsider,
            ipv6_of(outsider.ipv4),
            ipv6_of(two.ipv4),
            17,
            &guest::udp(7, 9, b"x"),
        ));
        net.await_report(outsider, |report| report.counters.denied == 2);
    }
    assert_eq!(two.hear(SILENCE, |_| Some(())), None);
    // An offload header that another guest's kernel would have to make sense of.
    let mut odd =
        [&[1, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0][..], &one.datagram(9, (two.ipv4, 7).into(), b"x")]
            .concat();
    one.packet(&odd);
    odd[0] = 0x40;
    one.packet(&odd);
    net.await_report(&one, |report| report.counters.frames_refused == 2);
    assert_eq!(two.hear(SILENCE, |_| Some(())), None);
}

#[test]
fn the_first_guest_keeps_its_address() {
    let net = Net::start(vec![]);
    let first = net.guest_at(1, [100, 100, 0, 7].into(), vec![], None, Limits::default());
    let second = net.guest_at(2, [100, 100, 0, 7].into(), vec![], None, Limits::default());
    assert!(is_alive(&first));
    second.raw(&ping(GATEWAY, &second, b"x"));
    assert_eq!(second.hear(SILENCE, |_| Some(())), None);
    assert_eq!(net.inspect(2), None);
}

#[test]
fn fragments_are_refused() {
    let net = Net::start(vec![]);
    let guest = net.guest(2, vec![host_rule()]);
    let mut frame = guest.datagram(9, (HOST, 9).into(), &[0; 16]);
    frame[20] = 0x20;
    frame[24..26].fill(0);
    let sum = checksum(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum);
    guest.raw(&frame);
    let report = net.await_report(&guest, |report| report.counters.frames_refused == 1);
    assert_eq!(report.denials[0].what, "fragment");
}

#[test]
fn a_flood_starves_nobody_and_an_unread_link_is_bounded() {
    let net = Net::start(vec![]);
    let limits = Limits { frames_per_s: 100, ..Limits::default() };
    let noisy = net.guest_with(2, vec![], None, limits);
    let quiet = net.guest(3, vec![]);
    let frame = [&[0; 12][..], &ping(GATEWAY, &noisy, &pattern(1000))].concat();
    let mut sent = 0;
    // Nothing of what comes back is read.
    while sent < 5000
        && rustix::net::send(&noisy.wire.frames, &frame, rustix::net::SendFlags::DONTWAIT).is_ok()
    {
        sent += 1;
    }
    assert!((1..5000).contains(&sent), "the sender is held back");
    assert!(is_alive(&quiet));
    assert!(net.report(&noisy).counters.frames_from_guest <= 250);
}

#[test]
fn a_link_that_is_detached_or_closed_leaves_nothing() {
    let net = Net::start(vec![]);
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = SocketAddr::from((HOST, server.local_addr().unwrap().port()));
    let mut guest = net.guest(2, vec![host_rule()]);
    guest.connect(to);
    let (mut host, _) = server.accept().unwrap();
    net.tell(&ToNet::Detach { link: 2 });
    assert_eq!(net.inspect(2), None);
    host.set_read_timeout(Some(SOON)).unwrap();
    let ended = std::io::Read::read(&mut host, &mut [0]).map_err(|error| error.kind());
    assert_eq!(ended, Err(std::io::ErrorKind::ConnectionReset));

    let mut guest = net.guest_at(9, guest.ipv4, vec![host_rule()], None, Limits::default());
    guest.connect(to);
    let (mut host, _) = server.accept().unwrap();
    drop(guest);
    host.set_read_timeout(Some(SOON)).unwrap();
    assert!(std::io::Read::read(&mut host, &mut [0]).is_err());
    assert_eq!(net.inspect(9), None);
}

#[test]
fn a_reset_guest_starts_anew_under_its_own_name() {
    let net = Net::start(vec![]);
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = SocketAddr::from((HOST, server.local_addr().unwrap().port()));
    let mut guest = net.guest(2, vec![host_rule()]);
    guest.connect(to);
    net.tell(&ToNet::Reset { request: 7, link: 2 });
    assert!(matches!(net.answer(), FromNet::Done { request: 7 }));
    let counters = net.report(&guest).counters;
    assert_eq!((counters.flows, counters.flows_opened), (0, 1));
    assert!(guest.connects(to));
}
