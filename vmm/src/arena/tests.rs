//! Two ends of an arena, one of them hostile.

use rustix::fs::memfd_create;

use super::*;

/// Both ends.
fn pair() -> (Arena, Arena) {
    let near = Arena::new().unwrap();
    let far = Arena::accept(near.memfd().unwrap().try_clone_to_owned().unwrap()).unwrap();
    (near, far)
}

fn packet(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|at| ((at + seed) % 251) as u8).collect()
}

fn place(message: Message) -> (u32, u32) {
    let Message::Packet { slot, length } = Message::decode(message.encode()) else {
        panic!("{message:?} is no packet")
    };
    (slot, length)
}

#[test]
fn packets_pass_whole_until_all_slots_are_taken() {
    let (near, far) = pair();
    let mut target = vec![0; SLOT];
    for round in 0..3 {
        let packets: Vec<_> = (0..SLOTS).map(|seed| packet(SLOT - 100 * seed, seed + round)).collect();
        let messages: Vec<_> =
            packets.iter().map(|packet| near.put_bytes(Way::ToGuest, packet).unwrap()).collect();
        assert_eq!(near.put_bytes(Way::ToGuest, &[0; 100]), None, "no slot is free");
        assert!(!near.is_idle());
        assert!(far.put_bytes(Way::ToNet, &[1; 100]).is_some_and(|message| {
            far.free(Way::ToNet, message);
            true
        }));
        for (message, packet) in messages.into_iter().zip(&packets) {
            let (slot, length) = place(message);
            assert_eq!(far.take(Way::ToGuest, slot, length, &mut target), Some(packet.len()));
            assert_eq!(&target[..packet.len()], packet);
        }
        assert!(near.is_idle());
    }
}

#[test]
fn pieces_are_joined() {
    let (near, far) = pair();
    let mut whole = packet(20_000, 0);
    let (left, right) = whole.split_at_mut(5000);
    let pieces = [VolatileSlice::from(left), VolatileSlice::from(right)];
    let (slot, length) = place(near.put(Way::ToNet, 20_000, pieces.into_iter()).unwrap());
    let mut target = vec![0; SLOT];
    assert_eq!(far.take(Way::ToNet, slot, length, &mut target), Some(20_000));
    assert_eq!(target[..20_000], packet(20_000, 0));
    let mut short = [0; 10];
    let mut put = |length| near.put(Way::ToNet, length, std::iter::once(VolatileSlice::from(&mut short[..])));
    assert_eq!(put(11), None, "fewer bytes than were said");
    assert_eq!(put(9), None, "more bytes than were said");
    assert!(put(10).is_some());
}

#[test]
fn what_cannot_be_is_not_taken() {
    let (near, _) = pair();
    let mut target = vec![0; 100];
    for (slot, length) in
        [(SLOTS as u32, 1), (u32::MAX - 3, 1), (0, SLOT as u32 + 1), (0, u32::MAX), (0, 101)]
    {
        assert_eq!(near.take(Way::ToNet, slot, length, &mut target), None, "{slot} {length}");
    }
    assert_eq!(near.put_bytes(Way::ToNet, &vec![0; SLOT + 1]), None);
    for message in [Message::Offer, Message::Gone, Message::Refused] {
        assert_eq!(Message::decode(message.encode()), message);
    }
}

#[test]
fn memory_that_could_shrink_is_not_accepted() {
    let make = |flags, size, seals| {
        let memfd = memfd_create("other", MemfdFlags::ALLOW_SEALING | flags).unwrap();
        ftruncate(&memfd, size).unwrap();
        fcntl_add_seals(&memfd, seals).unwrap();
        Arena::accept(memfd).map(drop).map_err(|error| error.kind())
    };
    let none = Err(io::ErrorKind::InvalidInput);
    let plain = MemfdFlags::CLOEXEC;
    assert_eq!(make(plain, SIZE as u64, SEALS), Ok(()));
    assert_eq!(make(plain, SIZE as u64, SealFlags::GROW | SealFlags::SEAL), none);
    assert_eq!(make(plain, SIZE as u64, SealFlags::empty()), none);
    assert_eq!(make(plain, SIZE as u64 - 1, SEALS), none);
    let (reader, _writer) = rustix::pipe::pipe().unwrap();
    assert_eq!(Arena::accept(reader).map(drop).map_err(|error| error.kind()), none);
}
