//! Connections the guest asks for.

use std::sync::{Arc, Mutex};

use super::super::dial::MAX_DIALS;
use super::super::{HostPorts, Vsock};
use super::guest::{Guest, header};
use super::*;

/// Questions of the guest: token and port.
#[derive(Clone, Debug, Default)]
struct Questions(Arc<Mutex<Vec<(u64, u32)>>>);

impl HostPorts for Questions {
    fn dial(&mut self, token: u64, port: u32) -> bool {
        self.0.lock().unwrap().push((token, port));
        true
    }
}

impl Questions {
    fn take(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

fn offered() -> (Guest, Questions) {
    let (guest, questions) = (Guest::new(), Questions::default());
    offer(&guest, &questions);
    (guest, questions)
}

fn offer(guest: &Guest, questions: &Questions) {
    let ports = Box::new(questions.clone());
    guest.host.devices.with_vsock(|vsock| vsock.offer_ports(ports));
}

fn request(from: u32, to: u32) -> Header {
    Header { src_port: from, dst_port: to, ..header(op::REQUEST) }
}

/// The only packet for the guest.
fn answer(guest: &mut Guest) -> Option<u16> {
    let first = guest.receive().map(|(header, _)| header.op);
    assert!(guest.receive().is_none());
    first
}

#[test]
fn a_guest_is_refused_unasked_when_nothing_is_offered() {
    let mut guest = Guest::new();
    guest.send(request(5000, 52), b"");
    assert_eq!(answer(&mut guest), Some(op::RST));
}

#[test]
fn a_guest_waits_for_the_hosts_answer_and_then_talks() {
    let (mut guest, questions) = offered();
    guest.send(request(5000, 52), b"");
    let asked = questions.take();
    let [(token, 52)] = asked[..] else { panic!("{asked:?}") };
    assert_eq!(answer(&mut guest), None, "no answer yet");

    let (mut stream, device_end) = UnixStream::pair().unwrap();
    stream.write_all(b"welcome").unwrap();
    guest.host.devices.dialled(token, Some(device_end.into()));
    let (response, _) = guest.receive().unwrap();
    assert_eq!((response.op, response.src_port, response.dst_port), (op::RESPONSE, 52, 5000));
    assert_eq!(guest.receive().unwrap().1, b"welcome");
    guest.send(Header { op: op::RW, ..request(5000, 52) }, b"thanks");
    assert_eq!(read_all(&mut stream), b"thanks");

    let (mut late, device_end) = UnixStream::pair().unwrap();
    guest.host.devices.dialled(token, Some(device_end.into()));
    assert!(is_closed(&mut late), "a question is answered once");
    assert_eq!(answer(&mut guest), None);
}

#[test]
fn the_host_may_refuse() {
    let (mut guest, questions) = offered();
    guest.send(request(5000, 52), b"");
    guest.host.devices.dialled(questions.take()[0].0, None);
    assert_eq!(answer(&mut guest), Some(op::RST));
}

#[test]
fn a_guest_that_gave_up_is_not_answered() {
    for change_of_mind in [op::RST, op::RW, op::REQUEST] {
        let (mut guest, questions) = offered();
        guest.send(request(5000, 52), b"");
        guest.send(Header { op: change_of_mind, ..request(5000, 52) }, b"");
        let reset = answer(&mut guest);
        assert_eq!(reset.is_none(), change_of_mind == op::RST, "{reset:?}");
        let (mut stream, device_end) = UnixStream::pair().unwrap();
        guest.host.devices.dialled(questions.take()[0].0, Some(device_end.into()));
        assert!(is_closed(&mut stream));
        assert_eq!(answer(&mut guest), None);
    }
}

#[test]
fn questions_are_bounded() {
    let (mut guest, questions) = offered();
    let most = MAX_DIALS as u32;
    for port in 0..most + 1 {
        guest.send(request(5000 + port, 52), b"");
    }
    assert_eq!(questions.take().len(), MAX_DIALS);
    let (refused, _) = guest.receive().unwrap();
    assert_eq!((refused.op, refused.dst_port), (op::RST, 5000 + most));
    assert_eq!(answer(&mut guest), None);
}

#[test]
fn a_rewound_guest_is_refused_and_answers_for_its_past_are_dropped() {
    let (mut guest, questions) = offered();
    let before = (guest.host.devices.save(), guest.driver.clone());
    guest.send(request(5000, 52), b"");
    assert!(guest.host.devices.save().vsock.device.had_connections, "a fork of this one must be told");
    let asked = questions.take();
    // Memory is not rewound here, so neither are the rings; the guest asks nothing more by then.
    let rings = guest.host.devices.save().vsock.queues;
    let mut states = before.0;
    states.vsock.queues = rings;
    guest.host.devices.rewind(&states).unwrap();
    let (mut stream, device_end) = UnixStream::pair().unwrap();
    guest.host.devices.dialled(asked[0].0, Some(device_end.into()));
    assert!(is_closed(&mut stream));
    guest.send(request(5001, 52), b"");
    assert_eq!(answer(&mut guest), Some(op::RST), "nothing is offered any more");
    assert_eq!(questions.take(), []);

    offer(&guest, &questions);
    guest.send(request(5002, 52), b"");
    assert_ne!(questions.take()[0].0, asked[0].0, "tokens are not used twice");
}

#[test]
fn a_driver_reset_ends_the_waiting() {
    let (guest, questions) = offered();
    let mut guest = guest;
    guest.send(request(5000, 52), b"");
    guest.host.write(Slot::Vsock, STATUS, 0);
    let (mut stream, device_end) = UnixStream::pair().unwrap();
    guest.host.devices.dialled(questions.take()[0].0, Some(device_end.into()));
    assert!(is_closed(&mut stream));
    assert!(guest.host.devices.with_vsock(Vsock::take_news).is_empty());
}
