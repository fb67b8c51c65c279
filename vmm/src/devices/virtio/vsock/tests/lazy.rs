//! Completed packets of the guest: when it is interrupted for them.

use super::guest::Guest;
use super::*;

/// A guest with an open connection that has seen all its interrupts.
fn at_rest() -> (Guest, UnixStream, Header) {
    let (mut guest, stream, request) = connected();
    while guest.receive().is_some() {}
    guest.host.devices.settle();
    guest.host.interrupts(Slot::Vsock);
    (guest, stream, request)
}

#[test]
fn a_completed_packet_alone_interrupts_in_a_moment() {
    let (mut guest, mut stream, request) = at_rest();
    guest.answer(&request, op::RW, 0, b"one");
    guest.answer(&request, op::RW, 0, b"two");
    assert_eq!(read_all(&mut stream), b"onetwo", "data is not put off");
    assert_eq!(guest.host.interrupts(Slot::Vsock), 0);
    assert!(guest.host.devices.owes_interrupt());
    guest.host.devices.settle();
    assert_eq!(guest.host.interrupts(Slot::Vsock), 1);
    assert!(!guest.host.devices.owes_interrupt());
    guest.host.devices.settle();
    assert_eq!(guest.host.interrupts(Slot::Vsock), 0, "once");
}

#[test]
fn an_answer_brings_the_interrupt() {
    let (mut guest, mut stream, request) = at_rest();
    guest.answer(&request, op::RW, 0, b"question");
    stream.write_all(b"answer").unwrap();
    guest.host.pump();
    assert_eq!(guest.host.interrupts(Slot::Vsock), 1);
    assert!(!guest.host.devices.owes_interrupt());
}

#[test]
fn a_driver_never_waits_for_room() {
    let (mut guest, mut stream, request) = at_rest();
    for _ in 0..63 {
        guest.answer(&request, op::RW, 0, b"x");
    }
    assert_eq!(guest.host.interrupts(Slot::Vsock), 0);
    guest.answer(&request, op::RW, 0, b"x");
    assert_eq!(guest.host.interrupts(Slot::Vsock), 1, "a quarter of the queue");
    assert!(!guest.host.devices.owes_interrupt());
    assert_eq!(read_all(&mut stream).len(), 64);
}

#[test]
fn a_fork_gets_the_interrupt_that_was_owed() {
    let (mut guest, _stream, request) = at_rest();
    guest.answer(&request, op::RW, 0, b"one");
    assert!(guest.host.devices.owes_interrupt());
    let host = guest.host.fork(&guest.host.devices.save()).unwrap();
    host.devices.kick();
    assert!(host.interrupts(Slot::Vsock) > 0);
    assert!(guest.host.devices.owes_interrupt(), "the original is owed it still");
}

#[test]
fn a_reset_driver_is_owed_nothing() {
    let (mut guest, _stream, request) = at_rest();
    guest.answer(&request, op::RW, 0, b"one");
    guest.host.write(Slot::Vsock, STATUS, 0);
    assert!(!guest.host.devices.owes_interrupt());
    guest.host.devices.settle();
    assert_eq!(guest.host.interrupts(Slot::Vsock), 0);
}
