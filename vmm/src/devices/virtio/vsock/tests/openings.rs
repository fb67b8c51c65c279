//! How streams from the host begin, and what becomes of forwarded ones.

use super::super::Vsock;
use super::guest::Guest;
use super::*;
use crate::protocol::Passage;

const GROUP: u32 = 7;

fn open(guest: &mut Guest, opening: Opening) -> (UnixStream, Header) {
    let (stream, device_end) = UnixStream::pair().unwrap();
    guest.host.devices.connect(AGENT, device_end.into(), opening).unwrap();
    (stream, guest.receive().unwrap().0)
}

fn forwarded(first: &[u8]) -> (Guest, UnixStream, Header) {
    let mut guest = Guest::new();
    let (mut stream, request) = open(&mut guest, Opening::Forwarded { group: GROUP, first: first.to_vec() });
    stream.write_all(b"hello").unwrap();
    guest.answer(&request, op::RESPONSE, 0, b"");
    (guest, stream, request)
}

fn news(guest: &Guest) -> Vec<(u32, Passage)> {
    guest.host.devices.with_vsock(Vsock::take_news)
}

#[test]
fn an_announced_stream_says_ok_before_any_byte_of_the_guest() {
    let mut guest = Guest::new();
    let (mut stream, request) = open(&mut guest, Opening::Announced);
    assert_eq!(read_all(&mut stream), b"", "the guest has not accepted");
    guest.answer(&request, op::RESPONSE, 0, b"");
    guest.answer(&request, op::RW, 0, b"data");
    let said = format!("OK {}\ndata", request.src_port);
    assert_eq!(read_all(&mut stream), said.as_bytes());
    guest.answer(&request, op::CREDIT_REQUEST, 0, b"");
    assert_eq!(guest.receive().unwrap().0.fwd_cnt, 4, "the guest's own bytes are counted, no others");
}

#[test]
fn a_refused_stream_is_not_told_ok() {
    let mut guest = Guest::new();
    let (mut stream, request) = open(&mut guest, Opening::Announced);
    guest.answer(&request, op::RST, 0, b"");
    let mut said = Vec::new();
    stream.read_to_end(&mut said).unwrap();
    assert_eq!(said, b"");
}

#[test]
fn a_forwarded_stream_begins_with_its_header_and_the_guests_verdict() {
    let (mut guest, mut stream, request) = forwarded(&[80, 0]);
    let sent: Vec<u8> = std::iter::from_fn(|| guest.receive()).flat_map(|(_, data)| data).collect();
    assert_eq!(sent, b"\x50\0hello");
    assert_eq!(news(&guest), []);
    guest.answer(&request, op::RW, 0, b"\0world");
    assert_eq!(read_all(&mut stream), b"world");
    assert_eq!(news(&guest), [(GROUP, Passage::Accepted)]);
    guest.answer(&request, op::RW, 0, b"\x01 is data by now");
    assert_eq!(read_all(&mut stream), b"\x01 is data by now");
    guest.answer(&request, op::CREDIT_REQUEST, 0, b"");
    let told = std::iter::from_fn(|| guest.receive()).last().unwrap().0;
    assert_eq!(told.fwd_cnt, 6 + 16, "the verdict counts");
    guest.answer(&request, op::SHUTDOWN, SHUTDOWN_BOTH, b"");
    assert_eq!(news(&guest), [(GROUP, Passage::Ended)]);
}

#[test]
fn a_header_is_cut_to_the_guests_credit() {
    let mut guest = Guest::new();
    let (_stream, request) = open(&mut guest, Opening::Forwarded { group: GROUP, first: vec![1; 10] });
    guest.buffer = 4;
    guest.answer(&request, op::RESPONSE, 0, b"");
    let sent = |guest: &mut Guest| -> usize {
        std::iter::from_fn(|| guest.receive()).map(|(_, data)| data.len()).sum()
    };
    assert_eq!(sent(&mut guest), 4);
    guest.forwarded = 4;
    guest.answer(&request, op::CREDIT_UPDATE, 0, b"");
    assert_eq!(sent(&mut guest), 4);
    guest.forwarded = 8;
    guest.answer(&request, op::CREDIT_UPDATE, 0, b"");
    assert_eq!(sent(&mut guest), 2);
}

#[test]
fn a_bad_verdict_closes_the_stream_and_is_told_once() {
    let (mut guest, mut stream, request) = forwarded(&[80, 0]);
    guest.answer(&request, op::RW, 0, b"\x01not a byte of this");
    assert!(is_closed(&mut stream));
    assert_eq!(std::iter::from_fn(|| guest.receive()).last().unwrap().0.op, op::RST);
    assert_eq!(news(&guest), [(GROUP, Passage::Refused)]);
    guest.answer(&request, op::RST, 0, b"");
    assert_eq!(news(&guest), []);
}

#[test]
fn an_end_without_a_verdict_is_a_refusal() {
    let (mut guest, _stream, request) = forwarded(&[80, 0]);
    guest.answer(&request, op::SHUTDOWN, SHUTDOWN_BOTH, b"");
    assert_eq!(news(&guest), [(GROUP, Passage::Refused)]);
}

#[test]
fn a_group_is_cut_and_no_other() {
    let (mut guest, mut cut, request) = forwarded(&[80, 0]);
    guest.answer(&request, op::RW, 0, b"\0");
    let (mut other, request) = open_other(&mut guest);
    while guest.receive().is_some() {}
    guest.host.devices.cut(GROUP);
    assert_eq!(guest.receive().unwrap().0.op, op::RST);
    assert!(is_closed(&mut cut));
    assert_eq!(news(&guest), [(GROUP, Passage::Accepted), (GROUP, Passage::Ended)]);
    guest.answer(&request, op::RW, 0, b"\0still here");
    assert_eq!(read_all(&mut other), b"still here");
}

fn open_other(guest: &mut Guest) -> (UnixStream, Header) {
    while guest.receive().is_some() {}
    let (stream, request) = open(guest, Opening::Forwarded { group: GROUP + 1, first: vec![0] });
    guest.answer(&request, op::RESPONSE, 0, b"");
    (stream, request)
}

#[test]
fn a_driver_reset_ends_forwarded_streams() {
    let (mut guest, _stream, request) = forwarded(&[80, 0]);
    guest.answer(&request, op::RW, 0, b"\0");
    guest.host.write(Slot::Vsock, STATUS, 0);
    assert_eq!(news(&guest), [(GROUP, Passage::Accepted), (GROUP, Passage::Ended)]);
}
