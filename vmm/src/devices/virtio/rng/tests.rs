use super::MAX_REQUEST;
use crate::devices::testing::{Driver, Host};
use crate::memory::layout::Slot;

#[test]
fn fills_requests_with_different_bytes() {
    let mut host = Host::new();
    let mut driver = Driver::start(&host, Slot::Rng, &[16]);
    driver.queues[0].add(&host.ram, &[], &[64, 1000]);
    driver.queues[0].add(&host.ram, &[], &[64]);
    driver.kick(&host, 0);
    host.pump();
    let (_, first) = driver.queues[0].take(&host.ram).unwrap();
    let (_, second) = driver.queues[0].take(&host.ram).unwrap();
    assert_eq!((first.len(), second.len()), (1064, 64));
    assert_ne!(first[..64], second[..]);
    assert!(first[64..].iter().any(|&byte| byte != 0));
    assert_eq!(host.interrupts(Slot::Rng), 1);
}

#[test]
fn large_requests_are_capped() {
    let mut host = Host::new();
    let mut driver = Driver::start(&host, Slot::Rng, &[16]);
    driver.queues[0].add(&host.ram, &[], &[8192; 10]);
    driver.kick(&host, 0);
    host.pump();
    assert_eq!(driver.queues[0].take(&host.ram).unwrap().1.len(), MAX_REQUEST);
}

#[test]
fn a_request_without_room_gets_nothing() {
    let mut host = Host::new();
    let mut driver = Driver::start(&host, Slot::Rng, &[16]);
    driver.queues[0].add(&host.ram, &[b"please"], &[]);
    driver.kick(&host, 0);
    host.pump();
    assert!(driver.queues[0].take(&host.ram).unwrap().1.is_empty());
}
