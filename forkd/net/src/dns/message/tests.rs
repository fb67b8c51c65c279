use simple_dns::rdata::CNAME;

use super::*;

fn query(name: &[&str], kind: u16) -> Vec<u8> {
    let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name {
        bytes.push(label.len() as u8);
        bytes.extend_from_slice(label.as_bytes());
    }
    bytes.push(0);
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&[0, 1]);
    bytes
}

#[test]
fn a_query_is_read_and_answered() {
    let query = parse(&query(&["Www", "Example"], 1)).unwrap();
    assert_eq!((query.question.name.as_str(), query.room), ("www.example", 512));
    let bytes = answer(&query, &Answer::of(&query, [1, 2, 3, 4].into()), |ttl| ttl, 512).unwrap();
    let reply = Packet::parse(&bytes).unwrap();
    assert_eq!((reply.id(), reply.questions[0].qname.to_string()), (0x1234, "Www.Example".into()));
    assert_eq!(address(&reply.answers[0]), Some([1, 2, 3, 4].into()));
}

#[test]
fn the_room_of_an_asker_is_believed_within_bounds() {
    for (said, meant) in [(0_u16, 512), (1232, 1232), (65535, 4096)] {
        let mut bytes = query(&["a"], 1);
        bytes[11] = 1;
        bytes.extend_from_slice(&[0, 0, 41]);
        bytes.extend_from_slice(&said.to_be_bytes());
        bytes.extend_from_slice(&[0; 6]);
        assert_eq!(parse(&bytes).unwrap().room, meant);
    }
}

#[test]
fn odd_names_are_refused() {
    let long = "a".repeat(63);
    let wrong = Err(Bad::Answered(0x1234, Code::FormatError));
    for name in [&["a.b"][..], &["a b"], &["\u{1}"], &["é"], &[], &[&long, &long, &long, &long]] {
        assert_eq!(parse(&query(name, 1)), wrong, "{name:?}");
    }
    assert!(parse(&query(&[&long, &long, &long, &long[..60]], 1)).is_ok());
    let mut compressed = query(&["ab"], 1);
    compressed[12] = 0xc0;
    assert_eq!(parse(&compressed), wrong);
    let mut chaos = query(&["a"], 1);
    *chaos.last_mut().unwrap() = 3;
    assert_eq!(parse(&chaos), wrong);
}

#[test]
fn no_prefix_of_a_query_is_a_query() {
    let bytes = query(&["www", "example"], 28);
    for end in 0..bytes.len() {
        assert!(parse(&bytes[..end]).is_err(), "cut at {end}");
    }
}

#[test]
fn what_leaves_is_name_and_type() {
    let asked = Question { name: "a.example".into(), kind: 16 };
    let mut expected = query(&["a", "example"], 16);
    expected[..2].copy_from_slice(&[9, 8]);
    assert_eq!(question(0x0908, &asked).unwrap(), expected);
}

fn reply(records: Vec<(&'static str, RData<'static>)>) -> Vec<u8> {
    let mut packet = Packet::new_reply(7);
    packet.questions.push(asked("a.example", 1));
    for (name, data) in records {
        packet.answers.push(ResourceRecord::new(Name::new_unchecked(name), CLASS::IN, 60, data));
    }
    packet.build_bytes_vec_compressed().unwrap()
}

fn a(last: u8) -> RData<'static> {
    RData::A(A { address: Ipv4Addr::new(1, 1, 1, last).to_bits() })
}

fn addresses(bytes: &[u8], id: u16, name: &str, kind: u16) -> Option<Vec<IpAddr>> {
    match heard(bytes, id, &Question { name: name.into(), kind }) {
        Heard::Answer(answer) => Some(answer.records.iter().filter_map(address).collect()),
        _ => None,
    }
}

#[test]
fn answers_must_match_their_question() {
    let bytes = reply(vec![("A.example", a(1))]);
    assert_eq!(addresses(&bytes, 7, "a.example", 1), Some(vec![[1, 1, 1, 1].into()]));
    assert_eq!(addresses(&bytes, 8, "a.example", 1), None);
    assert_eq!(addresses(&bytes, 7, "b.example", 1), None);
    assert_eq!(addresses(&bytes, 7, "a.example", 28), None);
    for end in 0..bytes.len() {
        assert_eq!(addresses(&bytes[..end], 7, "a.example", 1), None, "cut at {end}");
    }
}

#[test]
fn only_records_that_the_question_leads_to_count() {
    let alias = |to| RData::CNAME(CNAME(Name::new_unchecked(to)));
    let bytes = reply(vec![
        ("c.example", a(3)),
        ("b.example", alias("c.example")),
        ("a.example", alias("b.example")),
        ("c.example", alias("a.example")),
        ("evil.example", a(9)),
    ]);
    assert_eq!(addresses(&bytes, 7, "a.example", 1), Some(vec![[1, 1, 1, 3].into()]));
}

#[test]
fn an_answer_that_does_not_fit_is_marked() {
    let query = parse(&query(&["a", "example"], 1)).unwrap();
    let Heard::Answer(long) = heard(&reply(vec![("a.example", a(1)); 60]), 7, &query.question) else {
        panic!()
    };
    let bytes = answer(&query, &long, |ttl| ttl, 512).unwrap();
    assert!(bytes.len() <= 512);
    assert!(Packet::parse(&bytes).unwrap().has_flags(PacketFlag::TRUNCATION));
    assert_eq!(Packet::parse(&answer(&query, &long, |_| 3, 4096).unwrap()).unwrap().answers.len(), 60);
}
