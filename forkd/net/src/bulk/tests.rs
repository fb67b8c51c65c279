//! A link's arena with a device that may be hostile.

use std::{io::IoSlice, os::fd::AsFd};

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SocketFlags, SocketType, recv, sendmsg,
    socketpair,
};

use super::*;

/// A link's end, the device's end, and an arena that was offered.
struct World {
    bulk: Bulk,
    ours: OwnedFd,
    device: OwnedFd,
    now: Instant,
    buffer: Vec<u8>,
}

impl World {
    fn new() -> Self {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, device) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        Self { bulk: Bulk::default(), ours, device, now: Instant::now(), buffer: vec![0; 70_000] }
    }

    fn offer(&mut self, memfd: BorrowedFd<'_>) {
        let (fds, mut space) = ([memfd], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(&self.device, &[IoSlice::new(&Message::Offer.encode())], &mut ancillary, FLAGS).unwrap();
        assert_eq!(self.receive(), Ok(None));
    }

    fn receive(&mut self) -> Result<Option<usize>, Errno> {
        self.bulk.receive(self.ours.as_fd(), &mut self.buffer, self.now)
    }

    fn rest(&mut self, after: Duration) -> Option<Instant> {
        self.now += after;
        self.bulk.rest(self.ours.as_fd(), self.now)
    }

    /// What the device hears: a message, or a packet's length.
    fn hear(&self) -> Option<Result<Message, usize>> {
        let mut bytes = [0; 100];
        let (_, length) = recv(&self.device, &mut bytes[..], RecvFlags::TRUNC).ok()?;
        let message = bytes.first_chunk().filter(|_| length == Message::LEN);
        Some(message.map(|&message| Message::decode(message)).ok_or(length))
    }
}

#[test]
fn packets_pass_by_shared_memory_and_without() {
    let mut world = World::new();
    world.bulk.send(world.ours.as_fd(), &[3; LARGE]).unwrap();
    assert_eq!(world.hear(), Some(Err(LARGE)), "there is no arena yet");
    let arena = Arena::new().unwrap();
    world.offer(arena.memfd().unwrap());
    let message = arena.put_bytes(Way::ToNet, &[5; LARGE]).unwrap();
    send(&world.device, &message.encode(), FLAGS).unwrap();
    send(&world.device, &[6; 100], FLAGS).unwrap();
    assert_eq!(world.receive(), Ok(Some(LARGE)));
    assert_eq!(world.buffer[..LARGE], [5; LARGE]);
    assert_eq!(world.receive(), Ok(Some(100)));
    assert_eq!(world.receive(), Err(Errno::AGAIN));

    world.bulk.send(world.ours.as_fd(), &[7; LARGE]).unwrap();
    world.bulk.send(world.ours.as_fd(), &[8; LARGE - 1]).unwrap();
    let Some(Ok(Message::Packet { slot, length })) = world.hear() else {
        panic!("a large packet has a slot")
    };
    let mut packet = vec![0; LARGE];
    assert_eq!(arena.take(Way::ToGuest, slot, length, &mut packet), Some(LARGE));
    assert_eq!(packet, [7; LARGE]);
    assert_eq!(world.hear(), Some(Err(LARGE - 1)));
    for _ in 0..12 {
        world.bulk.send(world.ours.as_fd(), &[9; LARGE]).unwrap();
    }
    let heard: Vec<_> = std::iter::from_fn(|| world.hear()).collect();
    assert_eq!(heard.iter().filter(|heard| heard.is_err()).count(), 4, "eight slots, and the socket");
}

#[test]
fn an_arena_that_nothing_passes_through_is_given_up() {
    let mut world = World::new();
    assert_eq!(world.rest(Duration::ZERO), None);
    let arena = Arena::new().unwrap();
    world.offer(arena.memfd().unwrap());
    let first = world.rest(Duration::ZERO).expect("it looks again");
    assert_eq!(first - world.now, IDLE);
    assert_eq!(world.rest(IDLE / 2), None, "that has been said");
    world.bulk.send(world.ours.as_fd(), &[0; LARGE]).unwrap();
    assert!(world.rest(IDLE).is_some(), "it was used");
    assert!(world.rest(IDLE).is_some(), "a packet is on its way");
    let Some(Ok(Message::Packet { slot, length })) = world.hear() else { panic!("a packet") };
    arena.take(Way::ToGuest, slot, length, &mut vec![0; LARGE]);
    assert_eq!(world.rest(IDLE), None);
    assert_eq!(world.hear(), Some(Ok(Message::Gone)));
    // A packet that crossed the news.
    let message = arena.put_bytes(Way::ToNet, &[0; LARGE]).unwrap();
    send(&world.device, &message.encode(), FLAGS).unwrap();
    assert_eq!(world.receive(), Ok(None));
    assert_eq!(world.hear(), Some(Ok(Message::Gone)));
}

#[test]
fn what_a_hostile_device_offers_is_refused() {
    let mut world = World::new();
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    world.offer(pipe.as_fd());
    assert_eq!(world.hear(), Some(Ok(Message::Refused)));
    send(&world.device, &Message::Offer.encode(), FLAGS).unwrap();
    assert_eq!(world.receive(), Ok(None), "an offer of nothing");
    assert_eq!(world.hear(), Some(Ok(Message::Refused)));
    for message in [Message::Gone, Message::Refused] {
        send(&world.device, &message.encode(), FLAGS).unwrap();
        assert_eq!(world.receive(), Ok(None));
    }
    let arena = Arena::new().unwrap();
    world.offer(arena.memfd().unwrap());
    for (slot, length) in [(8, 100), (u32::MAX - 3, 100), (0, 69_633), (0, u32::MAX)] {
        send(&world.device, &Message::Packet { slot, length }.encode(), FLAGS).unwrap();
        assert_eq!(world.receive(), Ok(None), "slot {slot}, {length} bytes");
    }
    // A slot that was never filled holds what it holds, and is measured like any packet.
    send(&world.device, &Message::Packet { slot: 3, length: 5 }.encode(), FLAGS).unwrap();
    assert_eq!(world.receive(), Ok(Some(5)));
}
