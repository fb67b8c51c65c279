//! Messages of a guest, and a resolver's answers to them.

use forkling_proto::network::GATEWAY;
use simple_dns::Packet;

use super::{
    ReplyTo, Waiter,
    message::{self, Answer, Heard, Query, Question},
    resolver::Cached,
};
use crate::{
    control::Limits,
    fuzzing::{End, attach, detach, settle, with_net},
    policy::World,
    server::Net,
    wire::{self, PAYLOAD},
};

/// Where an answer's DNS message begins: behind IPv4 and UDP headers.
const MESSAGE: usize = PAYLOAD + 28;

/// Takes bytes for a guest's message and for what a resolver says to it. The first byte says how the second is made
/// to belong to the first; two more, how long the first is.
///
/// # Panics
/// If something happens that must not, which is what the fuzzer looks for.
pub fn dns(data: &[u8]) {
    let Some(([mode, low, high], rest)) = data.split_first_chunk::<3>() else { return };
    let (asked, told) = rest.split_at(usize::from(u16::from_le_bytes([*low, *high])).min(rest.len()));
    with_net(|net| {
        let end = attach(net, 2, Some("red"), Limits::default());
        net.ask(end.key, asked, ReplyTo::Udp(GATEWAY.into(), 9));
        settle(net);
        let query = message::parse(asked);
        // The library makes messages of types that it does not read.
        let readable = query.as_ref().is_ok_and(|query| message::is_asked(query.question.kind));
        check_answers(net, &end, false, readable);
        if let Ok(query) = query {
            check_answers_of_resolver(net, &end, &query, &belonging(*mode, &query, told));
        }
        if let Some((query, message)) = asked_in(told) {
            check_answers_of_resolver(net, &end, &query, message);
        }
        detach(net, end);
    });
}

/// What a resolver says, as an answer to the query if the mode says so.
fn belonging(mode: u8, query: &Query, told: &[u8]) -> Vec<u8> {
    let Some(mut head) = message::question(query.id, &query.question).filter(|_| mode & 1 != 0) else {
        return told.to_vec();
    };
    head[2] |= 0x80;
    head[7] = mode >> 4;
    head[9] = mode >> 2 & 3;
    head.extend_from_slice(told);
    head
}

/// The question that a message of a resolver repeats, if a guest can ask it.
fn asked_in(told: &[u8]) -> Option<(Query, &[u8])> {
    let packet = Packet::parse(told).ok()?;
    let asked = packet.questions.first()?;
    let name = asked.qname.to_string().to_ascii_lowercase();
    let question = message::question(packet.id(), &Question { name, kind: u16::from(asked.qtype) })?;
    Some((message::parse(&question).ok()?, told))
}

fn check_answers_of_resolver(net: &mut Net, end: &End, query: &Query, told: &[u8]) {
    let Heard::Answer(answer) = message::heard_unguarded(told, query.id, &query.question) else { return };
    check_encoding(query, &answer);
    let mut cached = Cached::now(answer, net.now);
    cached.here = false;
    let to = ReplyTo::Udp(GATEWAY.into(), 9);
    net.deliver(Waiter { link: end.key, query: query.clone(), to }, &cached);
    settle(net);
    check_answers(net, end, true, message::is_asked(query.question.kind));
}

/// An answer fits, or is cut until it does.
fn check_encoding(query: &Query, answer: &Answer) {
    for room in [512, 1232, 4096, usize::from(u16::MAX)] {
        if let Some(bytes) = message::answer(query, answer, |ttl| ttl, room) {
            assert!(bytes.len() <= room, "{} bytes where {room} fit", bytes.len());
        }
    }
}

/// What reaches the guest can be read, and leads to nothing private.
fn check_answers(net: &mut Net, end: &End, outside: bool, readable: bool) {
    while let Some(packet) = end.receive(net) {
        let message = packet.get(MESSAGE..).expect("a datagram");
        assert_eq!(packet[PAYLOAD + 9], wire::UDP);
        assert!(message[2] & 0x80 != 0, "no answer");
        let answer = match Packet::parse(message) {
            Ok(answer) => answer,
            Err(error) if readable => panic!("an answer that cannot be read: {error}: {message:02x?}"),
            Err(_) => continue,
        };
        let own = net.host.at(net.now);
        let world = World { guests: net.settings.guests, own };
        for address in answer.answers.iter().filter_map(message::address) {
            assert!(!outside || world.is_public(address), "{address} was opened by a name");
        }
    }
}
