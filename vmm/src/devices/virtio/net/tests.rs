//! The device between a driver and the other end of its wire.

use std::mem::MaybeUninit;

use rustix::{
    io::Errno,
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recv, recvmsg, send},
};

use super::*;
use crate::{
    arena::{Arena, Way},
    devices::testing::{BUFFER, Driver, Host},
    devices::virtio::mmio::registers::{NEEDS_RESET, STATUS},
    memory::layout::Slot,
};

/// A machine whose NIC runs and is plugged in.
fn running() -> (Host, Driver) {
    let host = Host::new();
    let driver = Driver::start(&host, Slot::Net, &[256, 256]);
    host.devices.plug();
    (host, driver)
}

/// Header and frame; every byte tells its place.
fn packet(len: usize) -> Vec<u8> {
    let mut packet: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
    packet[NUM_BUFFERS..HEADER].fill(0);
    packet
}

fn other_end_receives(host: &Host) -> Result<Vec<u8>, Errno> {
    let mut buffer = vec![0; 70_000];
    let (_, len) = recv(&host.wire, &mut buffer[..], RecvFlags::DONTWAIT)?;
    buffer.truncate(len);
    Ok(buffer)
}

fn other_end_sends(host: &Host, packet: &[u8]) {
    assert_eq!(send(&host.wire, packet, SendFlags::DONTWAIT), Ok(packet.len()));
}

/// The other end when it takes offers of shared memory.
#[derive(Default)]
struct Sharing {
    arena: Option<Arena>,
}

impl Sharing {
    /// The next packet, by whichever way.
    fn receives(&mut self, host: &Host) -> Result<Vec<u8>, Errno> {
        let (bytes, memfd) = receive_with_descriptor(host)?;
        let Some(&message) = bytes.first_chunk().filter(|_| bytes.len() == Message::LEN) else {
            return Ok(bytes);
        };
        match Message::decode(message) {
            Message::Offer => {
                self.arena = Some(Arena::accept(memfd.expect("with an offer comes a memfd")).unwrap());
                self.receives(host)
            }
            Message::Packet { slot, length } => {
                let mut packet = vec![0; length as usize];
                let taken = self.arena.as_ref().unwrap().take(Way::ToNet, slot, length, &mut packet);
                assert_eq!(taken, Some(packet.len()));
                Ok(packet)
            }
            other => panic!("a device never says {other:?}"),
        }
    }

    fn sends(&self, host: &Host, packet: &[u8]) {
        let message = self.arena.as_ref().unwrap().put_bytes(Way::ToGuest, packet).expect("a slot is free");
        other_end_sends(host, &message.encode());
    }
}

fn receive_with_descriptor(host: &Host) -> Result<(Vec<u8>, Option<OwnedFd>), Errno> {
    let (mut bytes, mut space) =
        (vec![0; 70_000], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let length =
        recvmsg(&host.wire, &mut [io::IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::DONTWAIT)?
            .bytes;
    bytes.truncate(length);
    let memfd = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    Ok((bytes, memfd))
}

/// What the driver finds: packets put together from their buffers, without `num_buffers`.
fn received(host: &Host, driver: &mut Driver) -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    while let Some((_, mut packet)) = driver.queues[RX].take(&host.ram) {
        let more = u16::from_le_bytes([packet[NUM_BUFFERS], packet[NUM_BUFFERS + 1]]) - 1;
        packet[NUM_BUFFERS..HEADER].fill(0);
        for _ in 0..more {
            let (_, part) = driver.queues[RX].take(&host.ram).expect("all parts come at once");
            packet.extend(part);
        }
        packets.push(packet);
    }
    packets
}

#[test]
fn frames_leave_as_they_are_in_whatever_pieces() {
    let (mut host, mut driver) = running();
    let frame = packet(HEADER + 1500);
    driver.queues[TX].add(&host.ram, &[&frame], &[]);
    driver.queues[TX].add(&host.ram, &[&frame[..5], &frame[5..12], &frame[12..700], &frame[700..]], &[]);
    driver.kick(&host, TX);
    host.pump();
    assert_eq!(other_end_receives(&host).unwrap(), frame);
    assert_eq!(other_end_receives(&host).unwrap(), frame);
    assert_eq!(other_end_receives(&host), Err(Errno::AGAIN));
    assert!(driver.queues[TX].take(&host.ram).is_some());
    assert!(driver.queues[TX].take(&host.ram).is_some());
}

#[test]
fn the_longest_frame_passes_both_ways() {
    let (mut host, mut driver) = running();
    let frame = packet(HEADER + MAX_FRAME);
    let pieces: Vec<&[u8]> = frame.chunks(BUFFER as usize).collect();
    driver.queues[TX].add(&host.ram, &pieces, &[]);
    driver.kick(&host, TX);
    host.pump();
    assert_eq!(Sharing::default().receives(&host).unwrap(), frame);
    host.interrupts(Slot::Net);
    for _ in 0..60 {
        driver.queues[RX].add(&host.ram, &[], &[1526]);
    }
    other_end_sends(&host, &frame);
    other_end_sends(&host, &packet(100));
    host.pump();
    let packets = received(&host, &mut driver);
    assert_eq!(packets, [frame, packet(100)]);
    assert_eq!(host.interrupts(Slot::Net), 1, "one for all that came in one pass");
}

#[test]
fn a_frame_without_room_waits_for_all_its_buffers() {
    let (mut host, mut driver) = running();
    let (large, small) = (packet(HEADER + 9000), packet(HEADER + 60));
    other_end_sends(&host, &large);
    other_end_sends(&host, &small);
    host.pump();
    for _ in 0..5 {
        driver.queues[RX].add(&host.ram, &[], &[1526]);
    }
    driver.kick(&host, RX);
    host.pump();
    assert_eq!(received(&host, &mut driver), Vec::<Vec<u8>>::new());
    driver.queues[RX].add(&host.ram, &[], &[1526]);
    driver.kick(&host, RX);
    host.pump();
    assert_eq!(received(&host, &mut driver), [large]);
    // In a buffer of its own, and after what came first.
    driver.queues[RX].add(&host.ram, &[], &[1526]);
    driver.kick(&host, RX);
    host.pump();
    assert_eq!(received(&host, &mut driver), [small]);
}

#[test]
fn frames_wait_in_the_queue_while_the_other_end_is_full() {
    let (mut host, mut driver) = running();
    let frame = packet(HEADER + 8000);
    let mut sent = 0;
    while driver.queues[TX].has_room(1) {
        driver.queues[TX].add(&host.ram, &[&frame], &[]);
        sent += 1;
    }
    driver.kick(&host, TX);
    host.pump();
    let mut arrived = 0;
    while other_end_receives(&host).is_ok() {
        arrived += 1;
    }
    assert!((1..sent).contains(&arrived), "the socket holds some, not all: {arrived} of {sent}");
    // Room is news for the device.
    for _ in 0..sent {
        host.pump();
        while other_end_receives(&host).is_ok() {
            arrived += 1;
        }
    }
    assert_eq!(arrived, sent);
}

#[test]
fn an_unplugged_nic_loses_what_it_sends_and_gets_nothing() {
    let mut host = Host::new();
    let mut driver = Driver::start(&host, Slot::Net, &[256, 256]);
    driver.queues[RX].add(&host.ram, &[], &[1526]);
    driver.queues[TX].add(&host.ram, &[&packet(100)], &[]);
    driver.kick(&host, TX);
    other_end_sends(&host, &packet(200));
    host.pump();
    assert!(driver.queues[TX].take(&host.ram).is_some(), "the driver gets its buffer back");
    assert_eq!(other_end_receives(&host), Err(Errno::AGAIN));
    assert!(received(&host, &mut driver).is_empty());
    host.devices.plug();
    driver.queues[TX].add(&host.ram, &[&packet(300)], &[]);
    driver.kick(&host, TX);
    host.pump();
    assert_eq!(other_end_receives(&host).unwrap(), packet(300));
    assert_eq!(received(&host, &mut driver), [packet(200)]);
    // A rewind unplugs.
    host.devices.rewind(&host.devices.save()).unwrap();
    driver.queues[TX].add(&host.ram, &[&packet(100)], &[]);
    driver.kick(&host, TX);
    host.pump();
    assert_eq!(other_end_receives(&host), Err(Errno::AGAIN));
}

#[test]
fn a_look_for_buffers_takes_none() {
    let mut host = Host::new();
    let mut driver = Driver::start(&host, Slot::Net, &[256, 256]);
    host.devices.look_for_buffers();
    driver.queues[RX].add(&host.ram, &[], &[1526]);
    host.devices.look_for_buffers();
    host.devices.plug();
    other_end_sends(&host, &packet(200));
    host.pump();
    assert_eq!(received(&host, &mut driver), [packet(200)]);
}

#[test]
fn what_is_no_frame_stops_the_device_until_its_reset() {
    for len in [0, 1, HEADER, HEADER + MIN_FRAME - 1, HEADER + MAX_FRAME + 1] {
        let (mut host, mut driver) = running();
        let frame = vec![0; len];
        let pieces: Vec<&[u8]> = frame.chunks(BUFFER as usize).collect();
        let pieces = if pieces.is_empty() { vec![&frame[..]] } else { pieces };
        driver.queues[TX].add(&host.ram, &pieces, &[]);
        driver.kick(&host, TX);
        host.pump();
        assert_ne!(host.read(Slot::Net, STATUS) & NEEDS_RESET, 0, "{len}");
        assert_eq!(other_end_receives(&host), Err(Errno::AGAIN), "{len}");
        host.write(Slot::Net, STATUS, 0);
        let mut again = Driver::start(&host, Slot::Net, &[256, 256]);
        again.queues[TX].add(&host.ram, &[&packet(100)], &[]);
        again.kick(&host, TX);
        host.pump();
        assert_eq!(other_end_receives(&host).unwrap(), packet(100), "{len}");
    }
}

#[test]
fn a_buffer_too_small_for_a_frame_stops_the_device() {
    let (mut host, mut driver) = running();
    driver.queues[RX].add(&host.ram, &[], &[HEADER as u32]);
    other_end_sends(&host, &packet(100));
    host.pump();
    assert_ne!(host.read(Slot::Net, STATUS) & NEEDS_RESET, 0);
}

#[test]
fn what_the_other_end_sends_wrongly_is_passed_over() {
    let (mut host, mut driver) = running();
    for _ in 0..60 {
        driver.queues[RX].add(&host.ram, &[], &[1526]);
    }
    other_end_sends(&host, &[0; HEADER + MIN_FRAME - 1]);
    other_end_sends(&host, &vec![0; HEADER + MAX_FRAME + 1]);
    other_end_sends(&host, &packet(100));
    host.pump();
    assert_eq!(received(&host, &mut driver), [packet(100)]);
}

#[test]
fn nothing_happens_when_the_other_end_is_gone() {
    let (mut host, mut driver) = running();
    let (gone, _) = rustix::net::socketpair(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::SEQPACKET,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    drop(std::mem::replace(&mut host.wire, gone));
    driver.queues[RX].add(&host.ram, &[], &[1526]);
    driver.queues[TX].add(&host.ram, &[&packet(100)], &[]);
    driver.kick(&host, TX);
    host.pump();
    assert!(driver.queues[TX].take(&host.ram).is_some());
    assert!(received(&host, &mut driver).is_empty());
    assert_eq!(host.read(Slot::Net, STATUS) & NEEDS_RESET, 0);
}

#[test]
fn configuration_is_what_every_template_has() {
    let (host, _) = running();
    let mut config = [0; 16];
    host.devices.mmio_read(Slot::Net.mmio_base() + 0x100, &mut config);
    assert_eq!(config[..6], TEMPLATE_MAC);
    assert_eq!(config[8..12], [1, 0, 0xf0, 0xff]);
    assert_eq!(config[12..], [0; 4]);
    host.devices.mmio_write(Slot::Net.mmio_base() + 0x100, &[0; 4]);
    assert_ne!(host.read(Slot::Net, STATUS) & NEEDS_RESET, 0, "the MAC address is read-only");
}

#[test]
fn large_frames_pass_by_shared_memory_in_order_with_small_ones() {
    let (mut host, mut driver) = running();
    let mut other = Sharing::default();
    let frames = [packet(HEADER + 40_000), packet(100), packet(HEADER + MAX_FRAME), packet(HEADER + 16_384)];
    for frame in &frames {
        let pieces: Vec<&[u8]> = frame.chunks(BUFFER as usize).collect();
        driver.queues[TX].add(&host.ram, &pieces, &[]);
    }
    driver.kick(&host, TX);
    host.pump();
    for frame in &frames {
        assert!(other.receives(&host).as_ref() == Ok(frame), "{} bytes", frame.len());
    }
    assert_eq!(other.receives(&host), Err(Errno::AGAIN));
    for _ in 0..200 {
        driver.queues[RX].add(&host.ram, &[], &[1526]);
    }
    other.sends(&host, &frames[0]);
    other_end_sends(&host, &frames[1]);
    other.sends(&host, &frames[2]);
    host.pump();
    assert!(received(&host, &mut driver) == frames[..3]);
    assert!(other.arena.as_ref().unwrap().is_idle());
}

#[test]
fn a_large_frame_without_room_waits_whole() {
    let (mut host, mut driver) = running();
    let mut other = Sharing::default();
    other_end_sends(&host, &packet(HEADER + 20_000));
    for _ in 0..14 {
        driver.queues[RX].add(&host.ram, &[], &[1526]);
    }
    driver.kick(&host, RX);
    host.pump();
    assert_eq!(
        received(&host, &mut driver),
        [packet(HEADER + 20_000)],
        "by the socket, and an arena is offered"
    );
    assert_eq!(other.receives(&host), Err(Errno::AGAIN));
    other.sends(&host, &packet(HEADER + 30_000));
    other.sends(&host, &packet(HEADER + 16_000));
    for _ in 0..19 {
        driver.queues[RX].add(&host.ram, &[], &[1526]);
    }
    driver.kick(&host, RX);
    host.pump();
    assert!(received(&host, &mut driver).is_empty());
    for _ in 0..12 {
        driver.queues[RX].add(&host.ram, &[], &[1526]);
    }
    driver.kick(&host, RX);
    host.pump();
    assert!(received(&host, &mut driver) == [packet(HEADER + 30_000), packet(HEADER + 16_000)]);
}

#[test]
fn shared_memory_goes_when_the_other_end_says_so_and_comes_again() {
    let (mut host, mut driver) = running();
    let mut other = Sharing::default();
    let frame = packet(HEADER + 20_000);
    let send = |host: &mut Host, driver: &mut Driver| {
        let pieces: Vec<&[u8]> = frame.chunks(BUFFER as usize).collect();
        driver.queues[TX].add(&host.ram, &pieces, &[]);
        driver.kick(host, TX);
        host.pump();
    };
    for _ in 0..60 {
        driver.queues[RX].add(&host.ram, &[], &[1526]);
    }
    for message in [Message::Gone, Message::Packet { slot: 99, length: u32::MAX }, Message::Offer] {
        send(&mut host, &mut driver);
        assert!(other.receives(&host).is_ok_and(|packet| packet.len() == HEADER + 20_000));
        other_end_sends(&host, &message.encode());
        host.pump();
    }
    // Nobody frees the slots: the socket takes what they have no place for.
    for _ in 0..9 {
        send(&mut host, &mut driver);
    }
    let mut plain = 0;
    while let Ok((bytes, _)) = receive_with_descriptor(&host) {
        plain += usize::from(bytes.len() == HEADER + 20_000);
    }
    assert_eq!(plain, 1);
    other_end_sends(&host, &Message::Refused.encode());
    host.pump();
    send(&mut host, &mut driver);
    assert_eq!(other_end_receives(&host).unwrap(), packet(HEADER + 20_000), "never again");
    assert!(received(&host, &mut driver).is_empty());
}
