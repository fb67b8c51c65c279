//! Connections and the fork of a machine.

use super::guest::Guest;
use super::*;
use crate::devices::virtio::vsock::EVENT;

/// The event the guest got, if one.
fn event(guest: &mut Guest) -> Option<Vec<u8>> {
    guest.host.pump();
    guest.driver.queues[EVENT].take(&guest.host.ram).map(|(_, event)| event)
}

#[test]
fn a_fork_without_connections_is_connected_to_at_once() {
    let mut guest = Guest::new();
    let (stream, request) = guest.accept(AGENT);
    drop(stream);
    guest.answer(&request, op::RST, 0, b"");
    while guest.receive().is_some() {}
    let mut fork = guest.fork();
    assert_eq!(event(&mut fork), None);
    let (_, request) = fork.accept(AGENT);
    assert_eq!(request.src_port, FIRST_HOST_PORT + 1, "ports go on");
}

#[test]
fn a_fork_with_connections_is_told_that_they_are_gone_before_anything_else() {
    let (mut guest, mut stream, _) = connected();
    assert!(guest.host.devices.save().vsock.device.had_connections);
    let mut fork = guest.fork();
    let (_client, device_end) = UnixStream::pair().unwrap();
    fork.host.devices.connect(AGENT, device_end.into(), Opening::Plain).unwrap();
    assert!(fork.receive().is_none());
    assert_eq!(event(&mut fork).unwrap(), [0; 4]);
    assert!(fork.receive().is_none(), "the guest has not dealt with it");
    assert!(fork.host.devices.save().vsock.device.had_connections, "a fork of this one must be told again");

    fork.driver.queues[EVENT].add(&fork.host.ram, &[], &[4]);
    fork.driver.kick(&fork.host, EVENT);
    assert_eq!(fork.receive().unwrap().0.op, op::REQUEST);
    assert_eq!(event(&mut fork), None, "once");

    // The machine it was forked from goes on.
    stream.write_all(b"still there?").unwrap();
    guest.host.pump();
    assert_eq!(guest.receive().unwrap().1, b"still there?");
}

#[test]
fn an_event_waits_for_a_buffer() {
    let mut guest = Guest::starved();
    guest.refill();
    let (_stream, _) = guest.accept(AGENT);
    let mut fork = guest.fork();
    let (_client, device_end) = UnixStream::pair().unwrap();
    fork.host.devices.connect(AGENT, device_end.into(), Opening::Plain).unwrap();
    assert_eq!(event(&mut fork), None);
    assert!(fork.receive().is_none());
    for expected in [Some(vec![0; 4]), None] {
        fork.driver.queues[EVENT].add(&fork.host.ram, &[], &[4]);
        fork.driver.kick(&fork.host, EVENT);
        assert_eq!(event(&mut fork), expected);
    }
    assert_eq!(fork.receive().unwrap().0.op, op::REQUEST);
}

#[test]
fn packets_of_lost_connections_are_reset() {
    let (guest, _stream, request) = connected();
    let mut fork = guest.fork();
    event(&mut fork).unwrap();
    fork.driver.queues[EVENT].add(&fork.host.ram, &[], &[4]);
    fork.driver.kick(&fork.host, EVENT);
    fork.answer(&request, op::RW, 0, b"anyone?");
    assert_eq!(fork.receive().unwrap().0.op, op::RST);
}

#[test]
fn packets_sent_before_the_freeze_are_answered_in_the_fork() {
    let mut guest = Guest::new();
    let stray = Header { src_port: 9, ..guest::header(op::RW) };
    guest.driver.queues[1].add(&guest.host.ram, &[&stray.to_bytes()], &[]);
    guest.driver.kick(&guest.host, 1);
    let mut fork = guest.fork();
    assert_eq!(fork.receive().unwrap().0.op, op::RST);
    assert!(fork.host.interrupts(Slot::Vsock) > 0);
}

#[test]
fn ports_wrap_around_before_the_last_one() {
    let guest = Guest::new();
    let mut states = guest.host.devices.save();
    states.vsock.device.last_port = u32::MAX - 2;
    let host = guest.host.fork(&states).unwrap();
    let mut fork = Guest { host, driver: guest.driver.clone(), buffer: 0, forwarded: 0 };
    assert_eq!(fork.accept(AGENT).1.src_port, u32::MAX - 1);
    assert_eq!(fork.accept(AGENT).1.src_port, FIRST_HOST_PORT);
    assert!(guest.host.restores(&fork.host.devices.save()));
}
