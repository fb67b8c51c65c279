//! A hostile guest beside others: none of them notices, and what it makes the process hold is bounded.

mod guest;

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    thread,
    time::Duration,
};

use forkling_net::control::{Limits, Membership};
use forkling_proto::network::{GATEWAY, GATEWAY_V6, HOST, ipv6_of, mac_of};
use guest::{Guest, Net, PATIENCE, host_rule, ipv6_frame, net_rule, pattern, segment};

const SILENCE: Duration = Duration::from_millis(200);

/// Most bytes on their way to a guest that reads nothing: what the kernel doubles of the socket's buffer of 1 MiB, and
/// what waits in the process (512 KiB, and 128 KiB for answers to what was read before).
const ON_THE_WAY: usize = (2048 + 512 + 128) * 1024;

/// Packets cut short, with bits flipped in every byte, and noise behind right headers.
fn malformed(guest: &Guest, port: u16) -> Vec<Vec<u8>> {
    let syn = guest.frame(guest.ipv4, HOST, 6, &segment(9, port, 2));
    let datagram = guest.datagram(9, (GATEWAY, 53).into(), &pattern(40));
    let six = ipv6_frame(guest, ipv6_of(guest.ipv4), GATEWAY_V6, 58, &pattern(40));
    let arp = [&[0xff; 6][..], &mac_of(guest.ipv4), &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &[0; 20]].concat();
    let mut packets = Vec::new();
    for frame in [syn, datagram, six, arp] {
        let packet = [&[0; 12][..], &frame].concat();
        packets.extend((1..packet.len()).map(|end| packet[..end].to_vec()));
        for byte in 0..packet.len() {
            for flip in [0xff, 1, 0x80, 0x10] {
                let mut odd = packet.clone();
                odd[byte] ^= flip;
                packets.push(odd);
            }
        }
    }
    for noise in pattern(8 * 4000).chunks_mut(40) {
        noise[6..12].copy_from_slice(&mac_of(guest.ipv4));
        let (kind, version) = if noise[0] & 1 == 0 { ([8, 0], 0x45) } else { ([0x86, 0xdd], 0x60) };
        noise[12..14].copy_from_slice(&kind);
        noise[14] = version;
        packets.push([&[0; 12], &*noise].concat());
    }
    packets.push(vec![0; 66_000]);
    packets
}

/// A datagram to the host and back, which the gateway has to carry.
fn is_served(guest: &Guest, echo: SocketAddr, data: &[u8]) -> bool {
    guest.exchange(9, echo, data, PATIENCE).as_deref() == Some(data)
}

fn udp_echo() -> SocketAddr {
    let echo = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = echo.local_addr().unwrap().port();
    thread::spawn(move || {
        let mut buffer = vec![0; 70_000];
        while let Ok((length, from)) = echo.recv_from(&mut buffer) {
            echo.send_to(&buffer[..length], from).unwrap();
        }
    });
    (HOST, port).into()
}

fn tcp_echo() -> SocketAddr {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in server.incoming().flatten() {
            thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
        }
    });
    (HOST, port).into()
}

#[test]
fn malformed_frames_leave_the_traffic_of_others_unharmed() {
    let net = Net::start(vec![]);
    let hostile = net.guest(2, vec![host_rule(), net_rule("127.0.0.0/8")]);
    let mut quiet = net.guest(3, vec![host_rule()]);
    let (tcp, udp) = (tcp_echo(), udp_echo());
    let stream = quiet.connect(tcp);
    let packets = malformed(&hostile, tcp.port());
    assert!(packets.len() > 1500);
    for (round, batch) in packets.chunks(100).enumerate() {
        for packet in batch {
            hostile.packet(packet);
        }
        let data = pattern(10_000 + round);
        assert_eq!(quiet.echo(stream, &data), data, "after {round} rounds");
    }
    hostile.hear(SILENCE, |_| None::<()>);
    assert!(is_served(&hostile, udp, b"it is not shut out either"));
    assert!(net.report(&hostile).counters.frames_refused > 800);
    let counters = net.report(&quiet).counters;
    assert_eq!((counters.frames_refused, counters.frames_dropped), (0, 0));
    assert_eq!((counters.denied, counters.limited, counters.flows), (0, 0, 1));
}

#[test]
fn what_a_guest_leaves_unread_is_dropped_beyond_a_bound() {
    let net = Net::start(vec![]);
    let member = || Some(Membership { group: "g".into(), names: vec![] });
    let sender = net.guest_with(2, vec![], member(), Limits::default());
    let deaf = net.guest_with(3, vec![], member(), Limits::default());
    let other = net.guest(4, vec![host_rule()]);
    let udp = udp_echo();
    let data = pattern(60_000);
    for round in 0..300 {
        sender.raw(&sender.datagram(9, (deaf.ipv4, 9).into(), &data));
        assert!(round % 50 > 0 || is_served(&other, udp, b"nobody waits for the deaf"));
    }
    let sent = net.await_report(&sender, |report| report.counters.frames_from_guest == 300);
    let dropped = net.report(&deaf).counters.frames_dropped;
    let mut heard = 0;
    while deaf.hear(SILENCE, |frame| frame.ends_with(&data).then_some(())).is_some() {
        heard += 1;
    }
    assert!(heard * data.len() <= ON_THE_WAY, "{heard} datagrams were on their way");
    assert!(heard > 0 && heard as u64 + dropped == sent.counters.frames_from_guest);
    // It has not lost its place.
    sender.raw(&sender.datagram(9, (deaf.ipv4, 9).into(), b"once more"));
    assert!(deaf.hear(PATIENCE, |frame| frame.ends_with(b"once more").then_some(())).is_some());
}

#[test]
fn a_guest_that_answers_for_nobody_fills_no_table() {
    let net = Net::start(vec![]);
    let limits = Limits { flows: 50, ..Limits::default() };
    let hostile = net.guest_with(2, vec![host_rule()], None, limits);
    // Connections to the resolver that are never acknowledged.
    for port in 1..2000 {
        hostile.raw(&hostile.frame(hostile.ipv4, GATEWAY, 6, &segment(port, 53, 2)));
    }
    let report = net.await_report(&hostile, |report| report.counters.frames_from_guest == 1999);
    assert_eq!((report.counters.flows, report.counters.limited), (50, 1949));
    let other = net.guest_at(3, Ipv4Addr::new(100, 100, 0, 3), vec![host_rule()], None, Limits::default());
    assert!(is_served(&other, udp_echo(), b"its table is its own"));
}
