//! Names: what is answered, what that opens, and what never leaves the host.

mod guest;

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, Ordering},
    },
    thread,
    time::Duration,
};

use forkling_net::control::{Counters, Limits, Membership, Rule, ToNet};
use forkling_proto::network::{GATEWAY, HOST};
use guest::{Guest, Net, host_rule, name_rule};
use simple_dns::{
    CLASS, Name, Packet, PacketFlag, QCLASS, QTYPE, Question, RCODE, ResourceRecord, TYPE,
    rdata::{A, CNAME, RData, TXT},
};

const DNS: (Ipv4Addr, u16) = (GATEWAY, 53);
const SOON: Duration = Duration::from_secs(8);
const SILENCE: Duration = Duration::from_millis(300);

type Heard = Arc<Mutex<Vec<Vec<u8>>>>;

/// A resolver that answers what `answers` says, and what it was asked.
fn resolver(answers: fn(&str) -> Vec<RData<'static>>) -> (SocketAddr, Heard) {
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = udp.local_addr().unwrap();
    let tcp = TcpListener::bind(address).unwrap();
    let heard = Heard::default();
    let log = heard.clone();
    thread::spawn(move || {
        let mut buffer = [0; 2000];
        while let Ok((length, from)) = udp.recv_from(&mut buffer) {
            log.lock().unwrap().push(buffer[..length].to_vec());
            // A forger is quicker, but knows neither number nor question.
            let mut forged = answer(&buffer[..length], |_| vec![a([6, 6, 6, 6])], false);
            forged[0] ^= 1;
            udp.send_to(&forged, from).unwrap();
            udp.send_to(&answer(&buffer[..length], answers, true), from).unwrap();
        }
    });
    thread::spawn(move || {
        for stream in tcp.incoming() {
            let mut stream = stream.unwrap();
            let mut length = [0; 2];
            stream.read_exact(&mut length).unwrap();
            let mut query = vec![0; u16::from_be_bytes(length).into()];
            stream.read_exact(&mut query).unwrap();
            let reply = answer(&query, answers, false);
            stream.write_all(&(reply.len() as u16).to_be_bytes()).unwrap();
            stream.write_all(&reply).unwrap();
        }
    });
    (address, heard)
}

fn answer(query: &[u8], answers: fn(&str) -> Vec<RData<'static>>, truncate: bool) -> Vec<u8> {
    let query = Packet::parse(query).unwrap();
    let name = query.questions[0].qname.to_string();
    let mut reply = Packet::new_reply(query.id());
    reply.questions = query.questions.clone();
    for data in answers(&name) {
        let ttl = if name.starts_with("brief") { 1 } else { 300 };
        reply.answers.push(ResourceRecord::new(Name::new_unchecked(&name), CLASS::IN, ttl, data));
    }
    if reply.answers.is_empty() {
        *reply.rcode_mut() = RCODE::NameError;
    }
    if truncate && name.starts_with("long") {
        reply.answers.clear();
        reply.set_flags(PacketFlag::TRUNCATION);
    }
    reply.build_bytes_vec_compressed().unwrap()
}

fn a(address: [u8; 4]) -> RData<'static> {
    RData::A(A { address: u32::from_be_bytes(address) })
}

/// Public addresses, since special ones are filtered out; nothing is ever sent there.
fn zone(name: &str) -> Vec<RData<'static>> {
    match name {
        "a.example" | "brief.example" | "x.wild.example" => vec![a([1, 1, 1, 1])],
        "long.example" => (1..100).map(|n| a([1, 1, 2, n])).collect(),
        "rebind.example" => vec![
            a([127, 0, 0, 1]),
            a([10, 0, 0, 1]),
            a([169, 254, 169, 254]),
            a([169, 254, 1, 2]),
            a([100, 100, 0, 3]),
            a([1, 1, 1, 9]),
        ],
        "text.example" => vec![RData::TXT(TXT::new().with_string("hello").unwrap())],
        "alias.example" => vec![RData::CNAME(CNAME(Name::new_unchecked("nowhere.example")))],
        _ => vec![],
    }
}

static NEXT_PORT: AtomicU16 = AtomicU16::new(30_000);

fn query(name: &str, kind: u16) -> Vec<u8> {
    let mut packet = Packet::new_query(77);
    packet.set_flags(PacketFlag::RECURSION_DESIRED);
    let kind = QTYPE::TYPE(TYPE::from(kind));
    packet.questions.push(Question::new(Name::new_unchecked(name), kind, QCLASS::CLASS(CLASS::IN), false));
    packet.build_bytes_vec().unwrap()
}

/// Code and records of the answer to a question.
fn ask(guest: &Guest, name: &str, kind: u16) -> (RCODE, Vec<String>) {
    let port = NEXT_PORT.fetch_add(1, Ordering::Relaxed);
    let bytes = guest.exchange(port, DNS.into(), &query(name, kind), SOON).expect("an answer");
    let reply = Packet::parse(&bytes).unwrap();
    assert_eq!((reply.id(), reply.questions[0].qname.to_string()), (77, name.to_owned()));
    let text = |record: &ResourceRecord<'_>| match &record.rdata {
        RData::A(a) => Ipv4Addr::from_bits(a.address).to_string(),
        RData::AAAA(a) => std::net::Ipv6Addr::from_bits(a.address).to_string(),
        other => format!("{other:?}"),
    };
    (reply.rcode(), reply.answers.iter().map(text).collect())
}

/// A guest with the one flow that it may have, so that what is allowed is counted as limited and nothing leaves the host.
fn full_guest(net: &Net, number: u8, mut rules: Vec<Rule>) -> Guest {
    rules.push(host_rule());
    let guest = net.guest_with(number, rules, None, Limits { flows: 1, ..Limits::default() });
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    guest.raw(&guest.datagram(9, (HOST, taken.local_addr().unwrap().port()).into(), b"x"));
    net.await_report(&guest, |report| report.counters.flows == 1);
    guest
}

/// Whether policy lets a [`full_guest`] go there.
fn is_open(net: &Net, guest: &Guest, to: Ipv4Addr) -> bool {
    let before = net.report(guest).counters;
    guest.raw(&guest.datagram(9, (to, 9).into(), b"x"));
    let settled = |after: &Counters| after.denied + after.limited > before.denied + before.limited;
    net.await_report(guest, |report| settled(&report.counters)).counters.limited > before.limited
}

#[test]
fn a_name_opens_its_addresses() {
    let (server, heard) = resolver(zone);
    let net = Net::start(vec![server]);
    let guest = full_guest(&net, 2, vec![name_rule("a.example")]);
    assert!(!is_open(&net, &guest, [1, 1, 1, 1].into()), "never resolved");
    assert_eq!(ask(&guest, "A.example", 1), (RCODE::NoError, vec!["1.1.1.1".into()]));
    assert!(is_open(&net, &guest, [1, 1, 1, 1].into()));
    assert!(!is_open(&net, &guest, [1, 1, 1, 2].into()));
    let other = full_guest(&net, 3, vec![name_rule("a.example")]);
    assert!(!is_open(&net, &other, [1, 1, 1, 1].into()), "resolved by another guest");
    assert_eq!(ask(&other, "a.example", 1).1, ["1.1.1.1"]);
    assert!(is_open(&net, &other, [1, 1, 1, 1].into()));
    let heard = heard.lock().unwrap();
    assert_eq!(heard.len(), 1, "one question for both guests");
    let mut expected = query("a.example", 1);
    expected[..2].copy_from_slice(&heard[0][..2]);
    assert_eq!(heard[0], expected, "nothing of the guest leaves but name and type, in lower case");
}

#[test]
fn an_address_is_closed_when_its_time_is_over() {
    let (server, _) = resolver(zone);
    let net = Net::start(vec![server]);
    let guest = full_guest(&net, 2, vec![name_rule("brief.example")]);
    assert_eq!(ask(&guest, "brief.example", 1).1, ["1.1.1.1"]);
    assert!(is_open(&net, &guest, [1, 1, 1, 1].into()));
    thread::sleep(Duration::from_millis(5200));
    assert!(!is_open(&net, &guest, [1, 1, 1, 1].into()));
}

#[test]
fn names_that_are_not_allowed_never_leave() {
    let (server, heard) = resolver(zone);
    let net = Net::start(vec![server]);
    let guest = net.guest(2, vec![name_rule("a.example"), name_rule("*.wild.example")]);
    let tunnel = format!("{}.{}.evil.example", "x".repeat(63), "y".repeat(63));
    for name in ["b.example", "wild.example", "sub.a.example", "1.0.0.10.in-addr.arpa", &tunnel] {
        assert_eq!(ask(&guest, name, 1), (RCODE::NameError, vec![]), "{name}");
    }
    assert_eq!(ask(&guest, "a.example", 12), (RCODE::NoError, vec![]), "a type that is never asked for");
    assert!(heard.lock().unwrap().is_empty());
    let denied: Vec<_> =
        net.denied(&guest).into_iter().map(|(what, name, ..)| (what, name.unwrap())).collect();
    assert_eq!(denied.len(), 5);
    assert_eq!(denied[0], ("dns".into(), "b.example".into()));
    assert_eq!(ask(&guest, "x.wild.example", 1).1, ["1.1.1.1"]);
    assert_eq!(heard.lock().unwrap().len(), 1);
}

#[test]
fn rebinding_is_filtered_out() {
    let (server, _) = resolver(zone);
    let net = Net::start(vec![server]);
    let guest = full_guest(&net, 2, vec![name_rule("rebind.example")]);
    assert_eq!(ask(&guest, "rebind.example", 1).1, ["1.1.1.9"]);
    let denied = net.denied(&guest);
    assert_eq!(denied.len(), 5);
    assert!(denied.iter().all(|(what, name, ..)| what == "dns" && name.as_deref() == Some("rebind.example")));
    for private in [[10, 0, 0, 1], [169, 254, 169, 254], [100, 100, 0, 3]] {
        assert!(!is_open(&net, &guest, private.into()), "{private:?}");
    }
}

#[test]
fn other_types_and_long_answers_pass() {
    let (server, _) = resolver(zone);
    let net = Net::start(vec![server]);
    let mut guest = net.guest(2, vec![name_rule("*.example")]);
    assert!(ask(&guest, "text.example", 16).1[0].contains("TXT"));
    assert!(ask(&guest, "alias.example", 1).1[0].contains("CNAME"));
    assert_eq!(ask(&guest, "nothing.example", 1).0, RCODE::NameError);
    assert_eq!(ask(&guest, "long.example", 1), (RCODE::NoError, vec![]), "marked as truncated");
    let connection = guest.connect(DNS);
    let question = query("long.example", 1);
    let framed = [&(question.len() as u16).to_be_bytes()[..], &question, &[0, 12], &[0; 12]].concat();
    guest.tcp(connection).send_slice(&framed).unwrap();
    guest.tcp(connection).close();
    let bytes = guest.read_to_end(connection);
    let length = usize::from(u16::from_be_bytes([bytes[0], bytes[1]]));
    assert_eq!(Packet::parse(&bytes[2..2 + length]).unwrap().answers.len(), 64);
    let second = Packet::parse(&bytes[2 + length + 2..]).unwrap();
    assert_eq!(second.rcode(), RCODE::FormatError);
}

#[test]
fn a_dead_resolver_is_passed_over() {
    let (server, _) = resolver(zone);
    let dead = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let net = Net::start(vec![dead, server]);
    let guest = net.guest(2, vec![name_rule("a.example")]);
    assert_eq!(ask(&guest, "a.example", 1).1, ["1.1.1.1"]);
    let net = Net::start(vec![dead]);
    let guest = net.guest(2, vec![name_rule("a.example")]);
    assert_eq!(ask(&guest, "a.example", 1).0, RCODE::ServerFailure);
}

#[test]
fn groups_have_names_of_their_own() {
    let net = Net::start(vec![]);
    let member = |group: &str, name: &str| Some(Membership { group: group.into(), names: vec![name.into()] });
    let one = net.guest_with(2, vec![], member("red", "worker-1"), Limits::default());
    let two = net.guest_with(3, vec![], member("red", "worker-2"), Limits::default());
    let other = net.guest_with(4, vec![], member("blue", "worker-3"), Limits::default());
    assert_eq!(ask(&one, "worker-2", 1).1, [two.ipv4.to_string()]);
    assert_eq!(ask(&two, "Worker-1.forkling.internal", 1).1, [one.ipv4.to_string()]);
    assert_eq!(ask(&one, "worker-2", 28).1, ["fd66:6f72:6b6c::6464:3"]);
    assert_eq!(ask(&one, "worker-3", 1).0, RCODE::NameError);
    assert_eq!(ask(&other, "worker-1", 1).0, RCODE::NameError);
    assert_eq!(ask(&one, "host.forkling.internal", 1).1, [HOST.to_string()]);
    assert_eq!(ask(&one, "host.forkling.internal", 28), (RCODE::NoError, vec![]));
    net.tell(&ToNet::Detach { link: 3 });
    assert_eq!(ask(&one, "worker-2", 1).0, RCODE::NameError);
}

#[test]
fn names_are_limited() {
    let net = Net::start(vec![]);
    let limits = Limits { names_per_s: 5, ..Limits::default() };
    let guest = net.guest_with(2, vec![], None, limits);
    for _ in 0..20 {
        guest.raw(&guest.datagram(9, DNS.into(), &query("host.forkling.internal", 1)));
    }
    let counters = net.await_report(&guest, |report| report.counters.names_asked == 20).counters;
    assert!((13..=15).contains(&counters.limited), "{counters:?}");
}

#[test]
fn what_is_no_query_is_no_harm() {
    let net = Net::start(vec![]);
    let guest = net.guest(2, vec![name_rule("*.example")]);
    let whole = query("a.example", 1);
    for end in 0..whole.len() {
        guest.raw(&guest.datagram(9, DNS.into(), &whole[..end]));
    }
    for byte in 0..whole.len() {
        let mut odd = whole.clone();
        odd[byte] ^= 0xff;
        guest.raw(&guest.datagram(9, DNS.into(), &odd));
    }
    let mut reply = whole.clone();
    reply[2] |= 0x80;
    assert_eq!(guest.exchange(10, DNS.into(), &reply, SILENCE), None, "answers are not answered");
    assert_eq!(ask(&guest, "host.forkling.internal", 1).0, RCODE::NoError);
}
