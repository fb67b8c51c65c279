//! Packets no driver should send.

use super::guest::{Guest, header};
use super::*;
use crate::devices::virtio::mmio::registers::NEEDS_RESET;

/// Sends a packet on an open connection; returns the answers' operations and whether the stream was closed.
fn provoke(change: impl FnOnce(&mut Header), data: &[u8]) -> (Vec<u16>, bool) {
    let (mut guest, mut stream, request) = connected();
    let mut packet = Header {
        src_port: request.dst_port,
        dst_port: request.src_port,
        len: data.len() as u32,
        ..header(op::RW)
    };
    change(&mut packet);
    guest.send_raw(packet, data);
    let answers = std::iter::from_fn(|| guest.receive()).map(|(answer, _)| answer.op).collect();
    assert_eq!(guest.host.read(Slot::Vsock, STATUS), 15, "the device goes on");
    (answers, is_closed(&mut stream))
}

#[test]
fn packets_with_wrong_context_ids_are_dropped() {
    for (src, dst) in [(2, 2), (4, 2), (3, 3), (3, 1), (3, u64::MAX), (3 | 1 << 32, 2), (3, 2 | 1 << 32)] {
        assert_eq!(provoke(|packet| (packet.src_cid, packet.dst_cid) = (src, dst), b"x"), (vec![], false));
    }
}

#[test]
fn packets_that_break_the_protocol_abort_their_connection() {
    type Change = fn(&mut Header);
    let cases: [(&str, Change); 8] = [
        ("unknown operation", |packet| packet.op = 8),
        ("operation 0", |packet| packet.op = 0),
        ("second request", |packet| packet.op = op::REQUEST),
        ("second response", |packet| packet.op = op::RESPONSE),
        ("longer than its chain", |packet| packet.len = 2),
        ("much longer than its chain", |packet| packet.len = u32::MAX),
        ("longer than the credit", |packet| packet.len = BUFFER + 1),
        ("operation with high bits", |packet| packet.op = op::RW | 0x100),
    ];
    for (name, change) in cases {
        assert_eq!(provoke(change, b"x"), (vec![op::RST], true), "{name}");
    }
}

#[test]
fn an_unknown_type_is_answered_with_a_reset() {
    for kind in [0, 2, 0xFFFF] {
        let (answers, _) = provoke(|packet| packet.kind = kind, b"x");
        assert_eq!(answers, [op::RST], "{kind}");
    }
}

#[test]
fn unknown_connections_are_reset_but_resets_are_not() {
    for op in [op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 9] {
        let (answers, closed) = provoke(|packet| (packet.op, packet.dst_port) = (op, 77), b"");
        assert_eq!((answers, closed), (vec![op::RST], false), "{op}");
    }
    let (answers, closed) = provoke(|packet| (packet.op, packet.dst_port) = (op::RST, 77), b"");
    assert_eq!((answers, closed), (vec![], false));
}

#[test]
fn data_before_the_response_aborts() {
    let mut guest = Guest::new();
    let (mut stream, device_end) = UnixStream::pair().unwrap();
    guest.host.devices.connect(AGENT, device_end.into(), Opening::Plain).unwrap();
    let (request, _) = guest.receive().unwrap();
    guest.answer(&request, op::RW, 0, b"early");
    assert_eq!(guest.receive().unwrap().0.op, op::RST);
    assert!(is_closed(&mut stream));
}

#[test]
fn a_guest_that_overruns_its_credit_is_cut_off() {
    let (mut guest, _stream, request) = connected();
    let mut answers = Vec::new();
    for _ in 0..200 {
        guest.answer(&request, op::RW, 0, &[0; 8000]);
        answers.extend(std::iter::from_fn(|| guest.receive()).map(|(answer, _)| answer.op));
    }
    assert!(answers.contains(&op::RST));
}

#[test]
fn empty_data_changes_nothing() {
    assert_eq!(provoke(|_| {}, b""), (vec![], false));
}

#[test]
fn shutdown_with_unknown_flags_is_none() {
    assert_eq!(provoke(|packet| (packet.op, packet.flags) = (op::SHUTDOWN, !3), b""), (vec![], false));
}

#[test]
fn too_small_chains_stop_the_device() {
    for queue in [0, 1] {
        let mut guest = Guest::starved();
        match queue {
            0 => guest.driver.queues[0].add(&guest.host.ram, &[], &[44]),
            _ => guest.driver.queues[1].add(&guest.host.ram, &[&[0; 43]], &[]),
        };
        // An answer is due, so that the receive queue is looked at.
        guest.driver.queues[1].add(&guest.host.ram, &[&header(op::RW).to_bytes()], &[]);
        guest.driver.kick(&guest.host, 1);
        guest.host.pump();
        assert_eq!(guest.host.read(Slot::Vsock, STATUS), 15 | NEEDS_RESET);
    }
}

#[test]
fn a_stopped_device_closes_its_streams_and_works_again_after_a_reset() {
    let (mut guest, mut stream, _) = connected();
    guest.driver.queues[1].offer(&guest.host.ram, 999);
    guest.driver.force_kick(&guest.host, 1);
    guest.host.pump();
    assert!(is_closed(&mut stream));
    let (_, device_end) = UnixStream::pair().unwrap();
    assert!(matches!(
        guest.host.devices.connect(AGENT, device_end.into(), Opening::Plain),
        Err(ConnectError::NotReady)
    ));

    guest.host.write(Slot::Vsock, STATUS, 0);
    for queue in &guest.driver.queues {
        use vm_memory::{Bytes, GuestAddress};
        guest.host.ram.write_slice(&[0; 0x8000], GuestAddress(queue.desc)).unwrap();
    }
    let mut guest = Guest::on(guest.host);
    guest.accept(AGENT);
}

#[test]
fn a_flood_of_strays_is_answered_in_bounded_memory() {
    let mut guest = Guest::starved();
    for port in 0..256 {
        let stray = Header { src_port: port, ..header(op::RW) };
        guest.driver.queues[1].add(&guest.host.ram, &[&stray.to_bytes()], &[]);
    }
    guest.driver.kick(&guest.host, 1);
    guest.host.pump();
    while guest.driver.queues[1].take(&guest.host.ram).is_some() {}
    for port in 256..300 {
        let stray = Header { src_port: port, ..header(op::RW) };
        guest.driver.queues[1].add(&guest.host.ram, &[&stray.to_bytes()], &[]);
    }
    guest.driver.kick(&guest.host, 1);
    guest.host.pump();
    assert!(guest.driver.queues[1].take(&guest.host.ram).is_none(), "left in the guest's queue");

    guest.refill();
    guest.host.pump();
    let ports: Vec<_> = std::iter::from_fn(|| guest.receive()).map(|(answer, _)| answer.dst_port).collect();
    assert_eq!(ports, (0..300).collect::<Vec<_>>(), "none is lost");
}

#[test]
fn random_packets_never_bring_the_device_down() {
    let mut seed = blake3::Hasher::new().update(b"vsock").finalize_xof();
    let (mut guest, _stream, request) = connected();
    for _ in 0..20_000 {
        let mut noise = [0; 48];
        seed.fill(&mut noise);
        let mut packet = Header::from_bytes(noise[..44].try_into().unwrap());
        // Mostly sensible, or nearly all would be dropped at the first check.
        packet.src_cid = 3;
        packet.dst_cid = 2;
        packet.kind = 1;
        packet.op %= 9;
        packet.src_port = AGENT;
        packet.dst_port = request.src_port + packet.dst_port % 4;
        packet.len %= 64;
        guest.send_raw(packet, &[0; 40][..usize::from(noise[44]) % 40]);
        while guest.receive().is_some() {}
        if noise[45] < 8 {
            let (_, device_end) = UnixStream::pair().unwrap();
            let _ = guest.host.devices.connect(AGENT, device_end.into(), Opening::Plain);
        }
    }
    assert_eq!(guest.host.read(Slot::Vsock, STATUS), 15);
}

#[test]
fn a_pass_is_bounded_and_goes_on_by_itself() {
    let mut guest = Guest::new();
    for port in 0..256 {
        let stray = Header { src_port: port, ..header(op::RW) };
        guest.driver.queues[1].add(&guest.host.ram, &[&stray.to_bytes()], &[]);
    }
    // More packets and answers than one pass takes, and only one kick.
    guest.driver.kick(&guest.host, 1);
    guest.host.pump();
    let mut answers = 0;
    while guest.driver.queues[0].take(&guest.host.ram).is_some() {
        answers += 1;
    }
    assert!(answers >= 128, "as many as there are receive buffers, got {answers}");
}
