use std::os::unix::net::UnixStream;

use super::*;

fn connection(guest_port: u32) -> Connection {
    let stream = UnixStream::pair().unwrap().0;
    Connection::to_guest(Key { host_port: 1, guest_port }, stream.into(), crate::protocol::Opening::Plain)
}

#[test]
fn turns_of_ended_connections_leave_nothing_behind() {
    let mut table = Table::default();
    for port in 0..5000 {
        let slot = table.insert(connection(port));
        assert_eq!(slot, 0, "slots are used again");
        assert!(table.remove(slot).is_some());
        assert!(!table.has_turns());
    }
    assert!(table.is_empty() && table.has_room());
}

#[test]
fn turns_go_round() {
    let mut table = Table::default();
    let slots: Vec<_> = (0..3).map(|port| table.insert(connection(port))).collect();
    table.schedule(slots[0]);
    let order: Vec<_> = std::iter::from_fn(|| table.next_control()).collect();
    assert_eq!(order, slots, "one turn each");
}

#[test]
fn a_draining_connection_keeps_its_slot_but_not_its_ports() {
    let mut table = Table::default();
    let slot = table.insert(connection(7));
    table.drain(slot);
    assert!(table.is_empty() && !table.has_turns());
    let other = table.insert(connection(7));
    assert_ne!(slot, other);
    assert!(table.remove(slot).is_some());
    assert_eq!(table.find(Key { host_port: 1, guest_port: 7 }), Some(other));
}
