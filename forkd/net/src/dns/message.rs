//! DNS messages (RFC 1035): what is read of a guest's, what is asked, what is answered.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use forkling_vmm::contain_panic;
use simple_dns::{
    CLASS, Name, Packet, PacketFlag, QCLASS, QTYPE, Question as Asked, RCODE, ResourceRecord, TYPE,
    rdata::{A, AAAA, RData},
};

#[cfg(test)]
mod tests;

/// Types that are asked for: A, CNAME, MX, TXT, AAAA, SRV, SVCB, HTTPS.
const TYPES: [u16; 8] = [1, 5, 15, 16, 28, 33, 64, 65];

/// Type A.
pub const TYPE_A: u16 = 1;
/// Type AAAA.
pub const TYPE_AAAA: u16 = 28;

/// Records taken of an answer.
const RECORDS: usize = 64;

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Question {
    /// Lower case, without a final dot.
    pub name: String,
    /// Record type.
    pub kind: u16,
}

/// A guest's query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    /// Repeated in the answer.
    pub id: u16,
    /// The name as it was written, repeated in the answer.
    pub spelled: String,
    /// The question.
    pub question: Question,
    /// Longest answer over UDP, in bytes.
    pub room: usize,
}

/// A query that is not understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bad {
    /// It is none.
    Ignored,
    /// The header is one; it is answered with this code.
    Answered(u16, Code),
}

/// How a query ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// Well.
    NoError,
    /// It was not understood.
    FormatError,
    /// Nobody knows.
    ServerFailure,
    /// There is no such name; also the answer for names that are denied: resolvers of guests believe it at once, and
    /// wait for long after any other (musl takes no other for an answer).
    NoName,
    /// Nothing like that is done here.
    NotImplemented,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// How it ended.
    pub code: Code,
    /// Records of the answer section.
    pub records: Vec<ResourceRecord<'static>>,
}

impl Answer {
    /// Without records.
    pub fn empty(code: Code) -> Self {
        Self { code, records: Vec::new() }
    }

    /// An address of a name that is answered here. Addresses of another family than asked for are left out.
    pub fn of(query: &Query, address: IpAddr) -> Self {
        let data = match (query.question.kind, address) {
            (TYPE_A, IpAddr::V4(v4)) => RData::A(A { address: v4.to_bits() }),
            (TYPE_AAAA, IpAddr::V6(v6)) => RData::AAAA(AAAA { address: v6.to_bits() }),
            _ => return Self::empty(Code::NoError),
        };
        let record = ResourceRecord::new(Name::new_unchecked(&query.spelled), CLASS::IN, 5, data);
        Self { code: Code::NoError, records: vec![record.into_owned()] }
    }

    /// Shortest TTL of its records, in seconds.
    pub fn ttl(&self) -> Option<u32> {
        self.records.iter().map(|record| record.ttl).min()
    }
}

/// The address in a record, if it holds one.
pub fn address(record: &ResourceRecord<'_>) -> Option<IpAddr> {
    match &record.rdata {
        RData::A(a) => Some(Ipv4Addr::from_bits(a.address).into()),
        RData::AAAA(a) => Some(Ipv6Addr::from_bits(a.address).into()),
        _ => None,
    }
}

/// Whether questions of this type are asked at all.
pub fn is_asked(kind: u16) -> bool {
    TYPES.contains(&kind)
}

/// Reads a guest's query: one question of class IN, a name of letters, digits, hyphens and underscores.
pub fn parse(bytes: &[u8]) -> Result<Query, Bad> {
    let Some((header, rest)) = bytes.split_first_chunk::<12>() else { return Err(Bad::Ignored) };
    let field = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    let id = field(0);
    if header[2] & 0x80 != 0 {
        return Err(Bad::Ignored);
    }
    if header[2] & 0x78 != 0 {
        return Err(Bad::Answered(id, Code::NotImplemented));
    }
    let wrong = Bad::Answered(id, Code::FormatError);
    if (field(4), field(6), field(8)) != (1, 0, 0) {
        return Err(wrong);
    }
    let (spelled, rest) = name(rest).ok_or(wrong)?;
    let Some(([a, b, 0, 1], additional)) = rest.split_first_chunk::<4>() else { return Err(wrong) };
    let question = Question { name: spelled.to_ascii_lowercase(), kind: u16::from_be_bytes([*a, *b]) };
    // An OPT record of the root (RFC 6891) tells how much the asker takes.
    let room = match additional {
        [0, 0, 41, high, low, ..] if field(10) > 0 => {
            usize::from(u16::from_be_bytes([*high, *low])).clamp(512, 4096)
        }
        _ => 512,
    };
    Ok(Query { id, spelled, question, room })
}

/// A name without compression, which a question has no use for.
fn name(mut bytes: &[u8]) -> Option<(String, &[u8])> {
    let mut name = String::new();
    loop {
        let (&length, rest) = bytes.split_first()?;
        if length == 0 {
            return (!name.is_empty()).then_some((name, rest));
        }
        let (label, rest) = rest.split_at_checked(usize::from(length))?;
        if length > 63 || !label.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(byte)) {
            return None;
        }
        if !name.is_empty() {
            name.push('.');
        }
        name.push_str(str::from_utf8(label).ok()?);
        if name.len() > 253 {
            return None;
        }
        bytes = rest;
    }
}

/// Encodes the answer to a query; records that do not fit are left out, and the answer is marked as truncated.
pub fn answer(query: &Query, answer: &Answer, ttl: impl Fn(u32) -> u32, room: usize) -> Option<Vec<u8>> {
    let mut packet = Packet::new_reply(query.id);
    packet.set_flags(PacketFlag::RECURSION_DESIRED | PacketFlag::RECURSION_AVAILABLE);
    *packet.rcode_mut() = rcode(answer.code);
    packet.questions.push(asked(&query.spelled, query.question.kind));
    for record in &answer.records {
        let mut record = record.clone();
        record.ttl = ttl(record.ttl);
        packet.answers.push(record);
    }
    let bytes = packet.build_bytes_vec_compressed().ok()?;
    if bytes.len() <= room {
        return Some(bytes);
    }
    packet.answers.clear();
    packet.set_flags(PacketFlag::TRUNCATION);
    packet.build_bytes_vec_compressed().ok()
}

/// A header that only tells what is wrong.
pub fn refusal(id: u16, code: Code) -> Option<Vec<u8>> {
    let mut packet = Packet::new_reply(id);
    *packet.rcode_mut() = rcode(code);
    packet.build_bytes_vec().ok()
}

fn rcode(code: Code) -> RCODE {
    match code {
        Code::NoError => RCODE::NoError,
        Code::FormatError => RCODE::FormatError,
        Code::ServerFailure => RCODE::ServerFailure,
        Code::NoName => RCODE::NameError,
        Code::NotImplemented => RCODE::NotImplemented,
    }
}

fn asked(name: &str, kind: u16) -> Asked<'_> {
    Asked::new(Name::new_unchecked(name), QTYPE::TYPE(TYPE::from(kind)), QCLASS::CLASS(CLASS::IN), false)
}

/// Encodes a question for a resolver: nothing of the guest's message but name and type.
pub fn question(id: u16, question: &Question) -> Option<Vec<u8>> {
    let mut packet = Packet::new_query(id);
    packet.set_flags(PacketFlag::RECURSION_DESIRED);
    packet.questions.push(asked(&question.name, question.kind));
    packet.build_bytes_vec().ok()
}

/// What a resolver says.
#[derive(Debug)]
pub enum Heard {
    /// Nothing that belongs to the question.
    Nothing,
    /// It would not fit; it is to be asked by TCP.
    Truncated,
    /// It has failed.
    Failed,
    /// This.
    Answer(Answer),
}

/// Reads a resolver's answer. Records that the question does not lead to are left out.
pub fn heard(bytes: &[u8], id: u16, question: &Question) -> Heard {
    // The library reads what strangers wrote.
    contain_panic(|| heard_unguarded(bytes, id, question)).unwrap_or(Heard::Failed)
}

pub(super) fn heard_unguarded(bytes: &[u8], id: u16, question: &Question) -> Heard {
    let Ok(packet) = Packet::parse(bytes) else { return Heard::Nothing };
    let [asked] = packet.questions.as_slice() else { return Heard::Nothing };
    let same = packet.id() == id
        && packet.has_flags(PacketFlag::RESPONSE)
        && lower(&asked.qname) == question.name
        && asked.qtype == QTYPE::TYPE(TYPE::from(question.kind))
        && asked.qclass == QCLASS::CLASS(CLASS::IN);
    if !same {
        return Heard::Nothing;
    }
    if packet.has_flags(PacketFlag::TRUNCATION) {
        return Heard::Truncated;
    }
    match packet.rcode() {
        RCODE::NoError => {
            Heard::Answer(Answer { code: Code::NoError, records: chain(&packet.answers, question) })
        }
        RCODE::NameError => Heard::Answer(Answer::empty(Code::NoName)),
        _ => Heard::Failed,
    }
}

fn lower(name: &Name<'_>) -> String {
    name.to_string().to_ascii_lowercase()
}

/// The records of the name asked for, and of those it is an alias of.
fn chain(records: &[ResourceRecord<'_>], question: &Question) -> Vec<ResourceRecord<'static>> {
    let mut names = vec![question.name.clone()];
    let mut at = 0;
    while let Some(name) = names.get(at).cloned() {
        for record in records.iter().filter(|record| lower(&record.name) == name) {
            if let RData::CNAME(alias) = &record.rdata {
                let alias = lower(&alias.0);
                if names.len() < 16 && !names.contains(&alias) {
                    names.push(alias);
                }
            }
        }
        at += 1;
    }
    let belongs = |record: &&ResourceRecord<'_>| {
        let kind = u16::from(record.rdata.type_code());
        record.class == CLASS::IN
            && (kind == question.kind || kind == 5)
            && names.contains(&lower(&record.name))
    };
    records.iter().filter(belongs).take(RECORDS).map(|record| record.clone().into_owned()).collect()
}
