use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::connection::BUFFER;
use super::packet::{Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use super::{ConnectError, FIRST_HOST_PORT, MAX_CONNECTIONS};
use crate::devices::testing::Host;
use crate::devices::virtio::mmio::registers::STATUS;
use crate::memory::layout::Slot;
use crate::protocol::Opening;

mod bulk;
mod dial;
mod guest;
mod hostile;
mod lazy;
mod line;
mod openings;
mod restore;

use guest::Guest;

/// Guest port of the agent in these tests.
const AGENT: u32 = 1024;

/// A guest and an open connection to its port [`AGENT`]: the host's end, and the REQUEST the guest saw.
fn connected() -> (Guest, UnixStream, Header) {
    let mut guest = Guest::new();
    let (stream, request) = guest.accept(AGENT);
    (guest, stream, request)
}

fn read_all(stream: &mut UnixStream) -> Vec<u8> {
    stream.set_nonblocking(true).unwrap();
    let mut data = Vec::new();
    if let Err(error) = stream.read_to_end(&mut data) {
        assert_eq!(error.kind(), ErrorKind::WouldBlock);
    }
    data
}

/// Whether the device has closed the stream.
fn is_closed(stream: &mut UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    matches!(stream.read(&mut [0; 1]), Ok(0))
}

#[test]
fn a_connection_is_asked_for_accepted_and_carries_data_both_ways() {
    let mut guest = Guest::new();
    let (mut stream, device_end) = UnixStream::pair().unwrap();
    // The client does not wait to be connected.
    stream.write_all(b"ping").unwrap();
    guest.host.devices.connect(AGENT, device_end.into(), Opening::Plain).unwrap();
    let (request, _) = guest.receive().unwrap();
    assert_eq!((request.op, request.src_port, request.dst_port), (op::REQUEST, FIRST_HOST_PORT, AGENT));
    assert_eq!((request.src_cid, request.dst_cid, request.kind, request.len), (2, 3, 1, 0));
    assert_eq!((request.buf_alloc, request.fwd_cnt), (BUFFER, 0));
    assert!(guest.receive().is_none(), "no data before it is accepted");

    guest.answer(&request, op::RESPONSE, 0, b"");
    let (data, bytes) = guest.receive().unwrap();
    assert_eq!((data.op, data.len, &bytes[..]), (op::RW, 4, &b"ping"[..]));
    guest.answer(&request, op::RW, 0, b"pong");
    assert_eq!(read_all(&mut stream), b"pong");
    stream.write_all(b"more").unwrap();
    guest.host.pump();
    let (data, bytes) = guest.receive().unwrap();
    assert_eq!((data.op, data.fwd_cnt, &bytes[..]), (op::RW, 4, &b"more"[..]));
    assert!(guest.receive().is_none());
}

#[test]
fn connections_get_ports_of_their_own() {
    let mut guest = Guest::new();
    let requests: Vec<_> = (0..3).map(|_| guest.accept(AGENT)).collect();
    let ports: Vec<_> = requests.iter().map(|(_, request)| request.src_port - FIRST_HOST_PORT).collect();
    assert_eq!(ports, [0, 1, 2]);
}

#[test]
fn a_refused_connection_closes_the_stream() {
    let mut guest = Guest::new();
    let (mut stream, device_end) = UnixStream::pair().unwrap();
    guest.host.devices.connect(AGENT, device_end.into(), Opening::Plain).unwrap();
    let (request, _) = guest.receive().unwrap();
    assert!(!is_closed(&mut stream));
    guest.answer(&request, op::RST, 0, b"");
    assert!(is_closed(&mut stream));
    assert!(guest.receive().is_none(), "a reset is not answered");
}

#[test]
fn without_a_driver_the_stream_is_closed_at_once() {
    let host = Host::new();
    let (mut stream, device_end) = UnixStream::pair().unwrap();
    assert!(matches!(
        host.devices.connect(AGENT, device_end.into(), Opening::Plain),
        Err(ConnectError::NotReady)
    ));
    assert!(is_closed(&mut stream));
}

#[test]
fn the_table_of_connections_is_bounded() {
    let mut guest = Guest::new();
    let mut ends = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        let (stream, device_end) = UnixStream::pair().unwrap();
        guest.host.devices.connect(AGENT, device_end.into(), Opening::Plain).unwrap();
        ends.push(stream);
        guest.receive().unwrap();
    }
    let (mut stream, device_end) = UnixStream::pair().unwrap();
    assert!(matches!(
        guest.host.devices.connect(AGENT, device_end.into(), Opening::Plain),
        Err(ConnectError::TooMany)
    ));
    assert!(is_closed(&mut stream));
}

#[test]
fn the_guests_credit_is_kept_to() {
    let mut guest = Guest::new();
    guest.buffer = 10_000;
    let (mut stream, request) = guest.accept(AGENT);
    stream.write_all(&[7; 30_000]).unwrap();
    guest.host.pump();
    let mut got = 0;
    let mut asked = 0;
    while let Some((header, data)) = guest.receive() {
        got += data.len();
        asked += usize::from(header.op == op::CREDIT_REQUEST);
    }
    assert_eq!((got, asked), (10_000, 1));

    guest.forwarded = 4000;
    guest.answer(&request, op::CREDIT_UPDATE, 0, b"");
    while let Some((_, data)) = guest.receive() {
        got += data.len();
    }
    assert_eq!(got, 14_000);

    guest.forwarded = 99_999;
    guest.answer(&request, op::CREDIT_UPDATE, 0, b"");
    assert!(guest.receive().is_none(), "a guest that lies gets nothing");
}

#[test]
fn the_hosts_credit_is_told_in_time() {
    let (mut guest, mut stream, request) = connected();
    let mut told = 0;
    let mut received = 0;
    for _ in 0..BUFFER / 4096 {
        guest.answer(&request, op::RW, 0, &[1; 4096]);
        received += read_all(&mut stream).len();
        while let Some((header, _)) = guest.receive() {
            assert_eq!((header.op, header.buf_alloc), (op::CREDIT_UPDATE, BUFFER));
            told = header.fwd_cnt;
        }
    }
    assert_eq!(received, BUFFER as usize);
    assert_eq!(told, BUFFER);
    guest.answer(&request, op::RW, 0, b"x");
    guest.answer(&request, op::CREDIT_REQUEST, 0, b"");
    assert_eq!(guest.receive().unwrap().0.fwd_cnt, BUFFER + 1);
}

#[test]
fn a_slow_host_gets_everything_in_the_end() {
    let (mut guest, mut stream, request) = connected();
    let sent: Vec<u8> = (0..2 * BUFFER).map(|index| (index / 7) as u8).collect();
    let mut got = Vec::new();
    let (mut position, mut credit_at) = (0_usize, 0_u32);
    for _ in 0..1000 {
        while position < sent.len() && position - (credit_at as usize) < BUFFER as usize {
            guest.answer(&request, op::RW, 0, &sent[position..position + 4096]);
            position += 4096;
        }
        got.extend(read_all(&mut stream));
        guest.host.pump();
        while let Some((header, _)) = guest.receive() {
            credit_at = header.fwd_cnt;
        }
    }
    assert!(got == sent);
}

#[test]
fn either_side_may_end_its_direction() {
    let (mut guest, mut stream, request) = connected();
    stream.write_all(b"question").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    guest.host.pump();
    assert_eq!(guest.receive().unwrap().1, b"question");
    let (end, _) = guest.receive().unwrap();
    assert_eq!((end.op, end.flags), (op::SHUTDOWN, SHUTDOWN_SEND));
    guest.answer(&request, op::RW, 0, b"answer");
    guest.answer(&request, op::SHUTDOWN, SHUTDOWN_SEND, b"");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, b"answer");
    let (end, _) = guest.receive().unwrap();
    assert_eq!((end.op, end.flags), (op::SHUTDOWN, SHUTDOWN_BOTH), "nothing can flow any more");
    guest.answer(&request, op::SHUTDOWN, SHUTDOWN_BOTH, b"");
    assert_eq!(guest.receive().unwrap().0.op, op::RST);
}

#[test]
fn a_guest_that_receives_no_more_can_still_send() {
    let (mut guest, mut stream, request) = connected();
    guest.answer(&request, op::SHUTDOWN, SHUTDOWN_RECEIVE, b"");
    stream.write_all(b"unwanted").unwrap();
    guest.host.pump();
    assert!(guest.receive().is_none());
    guest.answer(&request, op::RW, 0, b"still here");
    assert_eq!(read_all(&mut stream), b"still here");
}

#[test]
fn a_vanished_host_is_told_as_a_full_end() {
    let (mut guest, stream, request) = connected();
    drop(stream);
    guest.host.pump();
    let (end, _) = guest.receive().unwrap();
    assert_eq!((end.op, end.flags), (op::SHUTDOWN, SHUTDOWN_BOTH));
    guest.answer(&request, op::RW, 0, b"into the void");
    assert_eq!(guest.receive().unwrap().0.op, op::RST);
    guest.answer(&request, op::RW, 0, b"again");
    assert_eq!(guest.receive().unwrap().0.op, op::RST, "the connection is unknown now");
}

#[test]
fn what_the_guest_sent_before_it_closed_arrives() {
    let (mut guest, mut stream, request) = connected();
    for _ in 0..BUFFER / 4096 {
        guest.answer(&request, op::RW, 0, &[9; 4096]);
    }
    guest.answer(&request, op::SHUTDOWN, SHUTDOWN_BOTH, b"");
    let last = std::iter::from_fn(|| guest.receive()).last().unwrap();
    assert_eq!(last.0.op, op::RST, "the guest does not wait for the host");
    // Its ports can be used again while the host still reads.
    let mut got = 0;
    for _ in 0..1000 {
        got += read_all(&mut stream).len();
        guest.host.pump();
    }
    assert_eq!(got, BUFFER as usize);
    assert!(is_closed(&mut stream));
}

#[test]
fn a_driver_reset_closes_all_streams() {
    let (guest, mut stream, _) = connected();
    guest.host.write(Slot::Vsock, STATUS, 0);
    assert!(is_closed(&mut stream));
}

#[test]
fn a_stream_shared_with_its_sender_is_forgotten_all_the_same() {
    let mut guest = Guest::new();
    let (mut stream, device_end) = UnixStream::pair().unwrap();
    // As descriptors passed over a socket are.
    let sender = device_end.try_clone().unwrap();
    guest.host.devices.connect(AGENT, device_end.into(), Opening::Plain).unwrap();
    let (request, _) = guest.receive().unwrap();
    guest.answer(&request, op::RST, 0, b"");
    stream.write_all(b"anyone?").unwrap();
    let mut events = mio::Events::with_capacity(4);
    guest.host.poll.poll(&mut events, Some(std::time::Duration::ZERO)).unwrap();
    assert!(events.is_empty());
    drop(sender);
}

#[test]
fn a_guest_without_receive_buffers_gets_its_packets_later() {
    let mut guest = Guest::starved();
    let (mut stream, device_end) = UnixStream::pair().unwrap();
    stream.write_all(b"patience").unwrap();
    guest.host.devices.connect(AGENT, device_end.into(), Opening::Plain).unwrap();
    for port in 0..10 {
        guest.send(Header { src_port: port, ..guest::header(op::RW) }, b"");
    }
    guest.refill();
    guest.host.pump();
    let resets = (0..10).map(|_| guest.receive().unwrap().0);
    assert!(resets.into_iter().all(|header| header.op == op::RST), "resets first");
    assert_eq!(guest.receive().unwrap().0.op, op::REQUEST);
}
