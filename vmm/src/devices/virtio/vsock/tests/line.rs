//! The connection that forks inherit.

use super::guest::{Guest, header};
use super::*;
use crate::devices::virtio::vsock::state::LineState;

/// Port of the guest's end.
const OWN: u32 = 4711;

/// A guest whose agent has made the line.
fn with_line() -> Guest {
    let mut guest = Guest::new();
    guest.send(packet(op::REQUEST), b"");
    let (response, _) = guest.receive().unwrap();
    assert_eq!((response.op, response.src_port, response.dst_port), (op::RESPONSE, AGENT, OWN));
    assert_eq!((response.buf_alloc, response.fwd_cnt), (BUFFER, 0));
    assert!(guest.receive().is_none());
    guest
}

fn packet(op: u16) -> Header {
    Header { src_port: OWN, dst_port: AGENT, ..header(op) }
}

/// The next fork of a guest, which is to hear of nothing.
fn fork(guest: &Guest) -> Guest {
    let mut fork = guest.fork();
    assert!(fork.receive().is_none());
    fork
}

/// A stream joined with the agent's port.
fn connect(guest: &Guest) -> UnixStream {
    let (stream, device_end) = UnixStream::pair().unwrap();
    guest.host.devices.connect(AGENT, device_end.into(), Opening::Plain).unwrap();
    stream
}

#[test]
fn a_stream_takes_the_line_without_a_packet_and_carries_data_both_ways() {
    let mut fork = fork(&with_line());
    let mut stream = connect(&fork);
    assert!(fork.receive().is_none(), "it is open already");
    stream.write_all(b"ping").unwrap();
    fork.host.pump();
    let (data, bytes) = fork.receive().unwrap();
    assert_eq!((data.op, data.src_port, data.dst_port, &bytes[..]), (op::RW, AGENT, OWN, &b"ping"[..]));
    fork.send(Header { len: 4, ..packet(op::RW) }, b"pong");
    assert_eq!(read_all(&mut stream), b"pong");
    drop(stream);
    fork.host.pump();
    assert_eq!(fork.receive().unwrap().0.op, op::SHUTDOWN);
}

#[test]
fn each_fork_and_each_rewind_has_the_line_again() {
    let guest = with_line();
    let states = guest.host.devices.save();
    let line = LineState { host_port: AGENT, guest_port: OWN, buffer: 1 << 20 };
    assert_eq!(states.vsock.device.line, Some(line));
    assert!(!states.vsock.device.had_connections);
    for mut fork in [fork(&guest), fork(&guest)] {
        let mut stream = connect(&fork);
        fork.host.devices.rewind(&states).unwrap();
        assert!(is_closed(&mut stream));
        let mut stream = connect(&fork);
        stream.write_all(b"again").unwrap();
        fork.host.pump();
        assert_eq!(fork.receive().unwrap().1, b"again");
    }
}

#[test]
fn the_second_stream_and_one_with_an_opening_are_asked_for_as_ever() {
    let mut fork = fork(&with_line());
    let (_client, device_end) = UnixStream::pair().unwrap();
    fork.host.devices.connect(AGENT, device_end.into(), Opening::Announced).unwrap();
    assert_eq!(fork.receive().unwrap().0.op, op::REQUEST);
    let _first = connect(&fork);
    assert!(fork.receive().is_none());
    let _second = connect(&fork);
    assert_eq!(fork.receive().unwrap().0.op, op::REQUEST);
}

#[test]
fn a_line_that_is_used_ends_with_the_machine() {
    let first = fork(&with_line());
    let _stream = connect(&first);
    let state = first.host.devices.save().vsock.device;
    assert_eq!((state.had_connections, state.line), (true, None));
}

#[test]
fn only_the_first_connection_to_the_agents_port_is_the_line() {
    let host = Host::new();
    host.write(Slot::Vsock, STATUS, 0);
    let mut guest = Guest::on(host);
    guest.send(Header { dst_port: AGENT + 1, ..packet(op::REQUEST) }, b"");
    assert_eq!(guest.receive().unwrap().0.op, op::RST);
    guest.send(packet(op::REQUEST), b"");
    assert_eq!(guest.receive().unwrap().0.op, op::RESPONSE);
    guest.send(Header { src_port: OWN + 1, ..packet(op::REQUEST) }, b"");
    assert_eq!(guest.receive().unwrap().0.op, op::RST);
    assert!(guest.host.devices.save().vsock.device.line.is_some());
    // Nobody offers it in a fork.
    let mut plain = fork(&Guest::new());
    plain.send(packet(op::REQUEST), b"");
    assert_eq!(plain.receive().unwrap().0.op, op::RST);
}

#[test]
fn a_guest_may_say_what_it_can_take_and_nothing_else() {
    for (op, answer) in [
        (op::RW, Some(op::RST)),
        (op::REQUEST, Some(op::RST)),
        (op::SHUTDOWN, Some(op::RST)),
        (op::CREDIT_REQUEST, Some(op::RST)),
        (op::RST, None),
    ] {
        let mut fork = fork(&with_line());
        fork.send(Header { buf_alloc: 5, ..packet(op::CREDIT_UPDATE) }, b"");
        assert_eq!(fork.host.devices.save().vsock.device.line.unwrap().buffer, 5);
        fork.send(packet(op), b"");
        assert_eq!(fork.receive().map(|(header, _)| header.op), answer);
        let _stream = connect(&fork);
        assert_eq!(fork.receive().unwrap().0.op, op::REQUEST, "the line is gone");
    }
}

#[test]
fn a_line_beside_lost_connections_is_none() {
    let mut guest = with_line();
    let (_stream, _) = guest.accept(AGENT + 1);
    let mut states = guest.host.devices.save();
    assert_eq!(states.vsock.device.line, None);
    let line = LineState { host_port: AGENT, guest_port: OWN, buffer: 1 };
    states.vsock.device.line = Some(line.clone());
    assert!(!guest.host.restores(&states));
    states.vsock.device.had_connections = false;
    assert!(guest.host.restores(&states));
    states.vsock.device.line = Some(LineState { host_port: FIRST_HOST_PORT, ..line });
    assert!(!guest.host.restores(&states));
}

#[test]
fn a_freeze_before_the_answer_leaves_no_line() {
    let mut guest = Guest::starved();
    guest.send(packet(op::REQUEST), b"");
    let state = guest.host.devices.save().vsock.device;
    assert_eq!((state.had_connections, state.line), (true, None));
    guest.refill();
    assert_eq!(guest.receive().unwrap().0.op, op::RESPONSE);
    guest.host.write(Slot::Vsock, STATUS, 0);
    assert_eq!(guest.host.devices.save().vsock.device.line, None);
}
