use std::io::Write;

use super::ring::CAPACITY;
use super::*;

fn interrupts(serial: &Serial) -> u64 {
    serial.irq().read().unwrap_or(0)
}

#[test]
fn output_is_read_in_increments() {
    let mut serial = Serial::new(Backend::default()).unwrap();
    b"hello".iter().for_each(|&byte| serial.write(0, byte));
    assert_eq!(serial.output(0, 3), (0..3, b"hel".to_vec()));
    assert_eq!(serial.output(3, 100), (3..5, b"lo".to_vec()));
    assert_eq!(serial.output(5, 100), (5..5, Vec::new()));
    assert_eq!(serial.output(1000, 100), (5..5, Vec::new()));
}

#[test]
fn the_ring_keeps_the_last_bytes_and_the_count() {
    let mut ring = Ring::new(None);
    let written: Vec<u8> = (0..CAPACITY + 10).map(|index| index as u8).collect();
    written.chunks(1000).for_each(|chunk| ring.write_all(chunk).unwrap());
    let (range, kept) = ring.read(0, usize::MAX);
    assert_eq!(range, 10..CAPACITY as u64 + 10);
    assert_eq!(kept, written[10..]);
    ring.write_all(&vec![7; CAPACITY * 2]).unwrap();
    assert_eq!(ring.read(0, 1).0.start, CAPACITY as u64 * 2 + 10);
}

#[test]
fn a_reader_is_woken_once_until_it_reads() {
    let mut poll = mio::Poll::new().unwrap();
    let waker = Arc::new(mio::Waker::new(poll.registry(), mio::Token(1)).unwrap());
    let mut ring = Ring::new(Some(waker));
    let mut events = mio::Events::with_capacity(4);
    let mut wakes = || {
        poll.poll(&mut events, Some(std::time::Duration::ZERO)).unwrap();
        events.iter().count()
    };
    ring.write_all(b"a").unwrap();
    assert_eq!(wakes(), 1);
    ring.write_all(b"bc").unwrap();
    assert_eq!(wakes(), 0);
    ring.read(0, 2);
    assert_eq!(wakes(), 1, "there is more");
    ring.read(2, 100);
    assert_eq!(wakes(), 0);
    ring.write_all(b"d").unwrap();
    assert_eq!(wakes(), 1);
}

#[test]
fn a_driver_waiting_for_the_transmitter_gets_its_interrupt_after_a_restore() {
    let mut serial = Serial::new(Backend::default()).unwrap();
    serial.write(INTERRUPT_ENABLE, ENABLE_TRANSMIT_EMPTY);
    serial.write(0, b'a');
    // The driver reads the cause, which clears it, and is frozen before it sends its next byte.
    serial.read(2);
    let mut fork = Serial::restore(&serial.save(), Backend::default()).unwrap();
    interrupts(&fork);
    fork.kick();
    assert_eq!(interrupts(&fork), 1);
    assert_eq!(fork.read(2) & 0x0F, 2);
}

#[test]
fn a_kick_leaves_a_quiet_console_alone() {
    let mut serial = Serial::new(Backend::default()).unwrap();
    serial.write(LINE_CONTROL, DIVISOR_LATCH);
    serial.write(1, 0xFF);
    let state = serial.save();
    let mut fork = Serial::restore(&state, Backend::default()).unwrap();
    fork.kick();
    assert_eq!(interrupts(&fork), 0);
    assert_eq!(fork.save(), state);
}
