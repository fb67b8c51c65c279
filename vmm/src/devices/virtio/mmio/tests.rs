use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::registers::*;
use super::{CONFIG_CHANGE, USED_BUFFER};
use crate::devices::testing::{AVAIL_LOW, DESC_LOW, Driver, Host, QUEUE_NUM, QUEUE_SEL, RAM_SIZE, USED_LOW};
use crate::memory::layout::Slot;

const RNG: Slot = Slot::Rng;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Writes each status in turn; returns the last one read back.
fn walk(host: &Host, statuses: &[u32]) -> u32 {
    statuses.iter().for_each(|&status| host.write(RNG, STATUS, status));
    host.read(RNG, STATUS)
}

fn accept(host: &Host, features: u64) {
    for select in [0, 1] {
        host.write(RNG, 0x24, select);
        host.write(RNG, 0x20, word(features, select));
    }
}

#[test]
fn identifies_itself() {
    let host = Host::new();
    let ids = |slot| [0x00, 0x04, 0x08].map(|offset| host.read(slot, offset));
    assert_eq!(ids(Slot::Vsock), [0x7472_6976, 2, 19]);
    assert_eq!(ids(Slot::Pmem), [0x7472_6976, 2, 27]);
    assert_eq!(ids(Slot::Rng), [0x7472_6976, 2, 4]);
    assert_eq!(ids(Slot::Net), [0x7472_6976, 2, 1]);
    assert_eq!(host.read(RNG, 0xB0), u32::MAX, "no shared memory");
    assert_eq!(host.read(RNG, 0xFC), 0, "configuration generation");
}

#[test]
fn offers_its_features_by_word() {
    let host = Host::new();
    let words = [0, 1, 2, u32::MAX].map(|select| {
        host.write(RNG, 0x14, select);
        host.read(RNG, DEVICE_FEATURES)
    });
    assert_eq!(words, [1 << 29, 1, 0, 0]);
}

#[test]
fn status_goes_step_by_step_only() {
    for statuses in [
        &[2][..],
        &[3],
        &[8],
        &[11],
        &[15],
        &[4],
        &[1, 4],
        &[1, 5],
        &[1, 9],
        &[1, 3, 7],
        &[1, 16],
        &[1, 3, 1],
    ] {
        let host = Host::new();
        accept(&host, VERSION_1);
        host.write(RNG, STATUS, 0);
        assert_ne!(walk(&host, statuses) & NEEDS_RESET, 0, "{statuses:?}");
        assert_eq!(host.interrupts(RNG), 0, "no interrupt before DRIVER_OK");
        assert_eq!(walk(&host, &[0, 1, 3]), 3, "a reset heals");
    }
}

#[test]
fn a_running_driver_that_goes_back_is_told() {
    let host = Host::new();
    Driver::start(&host, RNG, &[16]);
    host.interrupts(RNG);
    assert_eq!(walk(&host, &[11]), 15 | NEEDS_RESET);
    assert_eq!(host.read(RNG, INTERRUPT_STATUS), CONFIG_CHANGE);
    assert_eq!(host.interrupts(RNG), 1);
}

#[test]
fn a_driver_may_give_up_at_any_time() {
    let host = Host::new();
    assert_eq!(walk(&host, &[1, 1 | FAILED]), 1 | FAILED);
    assert_eq!(walk(&host, &[0]), 0);
}

#[test]
fn features_must_be_offered_ones_and_version_1() {
    for (features, agreed) in [
        (VERSION_1, true),
        (VERSION_1 | EVENT_IDX, true),
        (0, false),
        (EVENT_IDX, false),
        (VERSION_1 | 1, false),
        (VERSION_1 | 1 << 34, false),
    ] {
        let host = Host::new();
        walk(&host, &[1, 3]);
        accept(&host, features);
        assert_eq!(walk(&host, &[11]) == 11, agreed, "{features:#x}");
        assert_eq!(host.read(RNG, STATUS) & NEEDS_RESET, 0, "only refused");
    }
}

#[test]
fn features_are_frozen_once_agreed_on() {
    let host = Host::new();
    Driver::prepared(&host, RNG, &[16]);
    accept(&host, VERSION_1);
    assert_eq!(host.read(RNG, STATUS), 11 | NEEDS_RESET);
}

#[test]
fn queues_are_set_up_between_features_and_driver_ok_only() {
    for statuses in [&[][..], &[1], &[1, 3]] {
        let host = Host::new();
        walk(&host, statuses);
        host.write(RNG, QUEUE_NUM, 8);
        assert_ne!(host.read(RNG, STATUS) & NEEDS_RESET, 0, "{statuses:?}");
    }
    for register in [QUEUE_NUM, DESC_LOW, DESC_LOW + 4, AVAIL_LOW, AVAIL_LOW + 4, USED_LOW, USED_LOW + 4] {
        let host = Host::new();
        Driver::prepared(&host, RNG, &[16]).set_up(&host, 0);
        host.write(RNG, register, 16);
        assert_eq!(host.read(RNG, STATUS), 11 | NEEDS_RESET, "ready: {register:#x}");
    }
    for register in [QUEUE_NUM, QUEUE_READY, DESC_LOW, AVAIL_LOW + 4, USED_LOW] {
        let host = Host::new();
        Driver::start(&host, RNG, &[16]);
        host.write(RNG, register, 0);
        assert_eq!(host.read(RNG, STATUS), 15 | NEEDS_RESET, "running: {register:#x}");
    }
}

#[test]
fn a_queue_may_be_taken_back_before_the_driver_runs() {
    let host = Host::new();
    let driver = Driver::prepared(&host, RNG, &[16]);
    driver.set_up(&host, 0);
    assert_eq!(host.read(RNG, QUEUE_READY), 1);
    host.write(RNG, QUEUE_READY, 0);
    assert_eq!(host.read(RNG, QUEUE_READY), 0);
    driver.set_up(&host, 0);
    assert_eq!(host.read(RNG, STATUS), 11);
}

#[test]
fn impossible_queues_are_refused() {
    let end = RAM_SIZE as u32;
    for (register, value) in [
        (QUEUE_NUM, 0),
        (QUEUE_NUM, 3),
        (QUEUE_NUM, 32),
        (QUEUE_NUM, 0x1_0010),
        (DESC_LOW, 0x10_0001),
        (DESC_LOW, end - 0xF0),
        (DESC_LOW + 4, 0xFFFF_FFFF),
        (AVAIL_LOW, 0x10_2001),
        (AVAIL_LOW, end - 0x10),
        (AVAIL_LOW, 0),
        (USED_LOW, 0x10_4002),
        (USED_LOW, end - 0x80),
        (USED_LOW + 4, 1),
    ] {
        let host = Host::new();
        let driver = Driver::prepared(&host, RNG, &[16]);
        driver.set_up(&host, 0);
        host.write(RNG, QUEUE_READY, 0);
        host.write(RNG, register, value);
        host.write(RNG, QUEUE_READY, 1);
        assert_eq!(host.read(RNG, STATUS), 11 | NEEDS_RESET, "{register:#x} = {value:#x}");
        assert_eq!(host.read(RNG, QUEUE_READY), 0);
    }
}

#[test]
fn queues_that_are_not_there_read_as_such() {
    let host = Host::new();
    Driver::prepared(&host, RNG, &[16]);
    for select in [1, u32::MAX] {
        host.write(RNG, QUEUE_SEL, select);
        assert_eq!([host.read(RNG, QUEUE_NUM_MAX), host.read(RNG, QUEUE_READY)], [0, 0]);
    }
    host.write(RNG, QUEUE_NUM, 8);
    assert_ne!(host.read(RNG, STATUS) & NEEDS_RESET, 0);
}

#[test]
fn registers_have_one_width() {
    let host = Host::new();
    let mut byte = [0xAA];
    host.devices.mmio_read(RNG.mmio_base(), &mut byte);
    assert_eq!(byte, [0]);
    let mut long = [0xAA; 8];
    host.devices.mmio_read(RNG.mmio_base() + STATUS, &mut long);
    assert_eq!(long, [0; 8]);
    host.devices.mmio_write(RNG.mmio_base() + STATUS, &[1]);
    assert_eq!(host.read(RNG, STATUS), NEEDS_RESET);
}

#[test]
fn read_only_registers_and_configuration_cannot_be_written() {
    for offset in [0x00, 0x08, DEVICE_FEATURES, QUEUE_NUM_MAX, INTERRUPT_STATUS, 0xFC, 0xFE, CONFIG, 0xFFC] {
        let host = Host::new();
        host.write(RNG, offset, 1);
        assert_eq!(host.read(RNG, STATUS), NEEDS_RESET, "{offset:#x}");
    }
}

#[test]
fn configuration_reads_of_any_width_stay_inside() {
    let host = Host::new();
    for width in [1, 2, 4, 8] {
        let mut data = vec![0xAA; width];
        host.devices.mmio_read(Slot::Vsock.mmio_base() + CONFIG, &mut data);
        assert_eq!(data[0], 3);
        for offset in [CONFIG + 8, 0xFF8, 0xFFF] {
            host.devices.mmio_read(Slot::Vsock.mmio_base() + offset, &mut data);
            assert!(data.iter().all(|&byte| byte == 0));
        }
    }
}

#[test]
fn interrupts_are_acknowledged_bit_by_bit() {
    let mut host = Host::new();
    let mut driver = Driver::start(&host, RNG, &[16]);
    driver.queues[0].add(&host.ram, &[], &[1]);
    driver.kick(&host, 0);
    host.pump();
    assert_eq!(host.read(RNG, INTERRUPT_STATUS), USED_BUFFER);
    host.write(RNG, INTERRUPT_ACK, CONFIG_CHANGE);
    assert_eq!(host.read(RNG, INTERRUPT_STATUS), USED_BUFFER);
    host.write(RNG, INTERRUPT_ACK, USED_BUFFER);
    assert_eq!(host.read(RNG, INTERRUPT_STATUS), 0);
}

#[test]
fn event_idx_suppresses_interrupts_until_the_driver_has_looked() {
    let mut host = Host::new();
    let mut driver = Driver::start(&host, RNG, &[16]);
    for expected in [1, 0, 0] {
        driver.queues[0].add(&host.ram, &[], &[1]);
        driver.kick(&host, 0);
        host.pump();
        assert_eq!(host.interrupts(RNG), expected);
    }
    while driver.queues[0].take(&host.ram).is_some() {}
    driver.queues[0].add(&host.ram, &[], &[1]);
    driver.kick(&host, 0);
    host.pump();
    assert_eq!(host.interrupts(RNG), 1);
}

#[test]
fn chains_added_before_driver_ok_are_served() {
    let mut host = Host::new();
    let mut driver = Driver::prepared(&host, RNG, &[16]);
    driver.set_up(&host, 0);
    driver.queues[0].add(&host.ram, &[], &[8]);
    driver.kick(&host, 0);
    host.pump();
    assert!(driver.queues[0].take(&host.ram).is_none());
    host.write(RNG, STATUS, 15);
    host.pump();
    assert_eq!(driver.queues[0].take(&host.ram).unwrap().1.len(), 8);
}

#[test]
fn a_ring_goes_round_many_times() {
    let mut host = Host::new();
    let mut driver = Driver::start(&host, RNG, &[4]);
    for round in 0..70_000 {
        driver.queues[0].add(&host.ram, &[], &[1]);
        if round % 4 == 3 {
            driver.kick(&host, 0);
            host.pump();
            let done = std::iter::from_fn(|| driver.queues[0].take(&host.ram)).count();
            assert_eq!(done, 4);
        }
    }
}

/// A started rng driver, with `break_it` done to its queue and a kick.
fn broken_by(break_it: impl FnOnce(&Host, &mut Driver)) -> (Host, Driver) {
    let mut host = Host::new();
    let mut driver = Driver::start(&host, RNG, &[16]);
    break_it(&host, &mut driver);
    driver.force_kick(&host, 0);
    host.pump();
    (host, driver)
}

#[test]
fn broken_chains_stop_the_device_and_a_reset_heals_it() {
    type Descriptors = &'static [(u64, u32, u16, u16)];
    let chains: [(&str, Descriptors); 9] = [
        ("loop to itself", &[(0x1000, 8, WRITE | NEXT, 0)]),
        ("loop of two", &[(0x1000, 8, WRITE | NEXT, 1), (0x1000, 8, WRITE | NEXT, 0)]),
        ("next beyond the table", &[(0x1000, 8, WRITE | NEXT, 16)]),
        ("outside RAM", &[(RAM_SIZE, 8, WRITE, 0)]),
        ("across the end of RAM", &[(RAM_SIZE - 4, 8, WRITE, 0)]),
        ("wrapping address", &[(u64::MAX - 3, 8, WRITE, 0)]),
        ("readable after writable", &[(0x1000, 8, WRITE | NEXT, 1), (0x1000, 8, 0, 0)]),
        ("more than 4 GiB", &[(0x1000, u32::MAX, WRITE | NEXT, 1), (0x1000, u32::MAX, WRITE, 0)]),
        ("bad indirect table", &[(RAM_SIZE, 16, INDIRECT, 0)]),
    ];
    for (name, chain) in chains {
        let (mut host, _) = broken_by(|host, driver| {
            for (index, &(address, len, flags, next)) in chain.iter().enumerate() {
                let descriptor = Descriptor::new(address, len, flags, next);
                driver.queues[0].describe(&host.ram, index as u16, descriptor);
            }
            driver.queues[0].offer(&host.ram, 0);
        });
        assert_eq!(host.read(RNG, STATUS), 15 | NEEDS_RESET, "{name}");
        assert_eq!(host.read(RNG, INTERRUPT_STATUS), CONFIG_CHANGE, "{name}");
        assert_eq!(host.interrupts(RNG), 1, "{name}");

        host.write(RNG, STATUS, 0);
        assert_eq!(host.read(RNG, INTERRUPT_STATUS), 0);
        host.ram.write_slice(&[0; 0x8000], GuestAddress(0x10_0000 + 0x80_0000 * RNG as u64)).unwrap();
        let mut driver = Driver::start(&host, RNG, &[16]);
        driver.queues[0].add(&host.ram, &[], &[8]);
        driver.kick(&host, 0);
        host.pump();
        assert!(driver.queues[0].take(&host.ram).is_some(), "{name}");
    }
}

#[test]
fn a_chain_longer_than_its_queue_stops_the_device() {
    let (host, _) = broken_by(|host, driver| {
        // An indirect table of 17 good entries, one more than the queue has.
        for index in 0..17_u16 {
            let flags = WRITE | if index < 16 { NEXT } else { 0 };
            let descriptor = Descriptor::new(0x1000, 1, flags, index + 1);
            let raw = virtio_queue::desc::RawDescriptor::from(descriptor);
            host.ram.write_obj(raw, GuestAddress(0x2000 + u64::from(index) * 16)).unwrap();
        }
        driver.queues[0].describe(&host.ram, 0, Descriptor::new(0x2000, 17 * 16, INDIRECT, 0));
        driver.queues[0].offer(&host.ram, 0);
    });
    assert_eq!(host.read(RNG, STATUS), 15 | NEEDS_RESET);
}

#[test]
fn ring_lies_stop_the_device() {
    let (host, _) = broken_by(|host, driver| {
        host.ram.write_obj(17_u16, GuestAddress(driver.queues[0].avail + 2)).unwrap();
    });
    assert_eq!(host.read(RNG, STATUS), 15 | NEEDS_RESET, "more chains than entries");
    let (host, _) = broken_by(|host, driver| driver.queues[0].offer(&host.ram, 16));
    assert_eq!(host.read(RNG, STATUS), 15 | NEEDS_RESET, "a head beyond the table");
}

#[test]
fn a_stopped_device_does_nothing_more() {
    let (mut host, mut driver) = broken_by(|host, driver| driver.queues[0].offer(&host.ram, 16));
    driver.queues[0].add(&host.ram, &[], &[8]);
    driver.kick(&host, 0);
    host.pump();
    assert!(driver.queues[0].take(&host.ram).is_none());
}

#[test]
fn no_kick_is_missed_by_a_driver_on_another_cpu() {
    const ROUNDS: u32 = 20_000;
    let mut host = Host::new();
    let mut driver = Driver::start(&host, RNG, &[16]);
    let (ram, devices, done) = (host.ram.clone(), &host.devices, AtomicBool::new(false));
    // As an ioeventfd does, so that the device works beside the driver, like those that have one.
    let kick = || devices.rng.notify().write(1).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut taken, deadline) = (0, Instant::now() + Duration::from_secs(30));
            while taken < ROUNDS && Instant::now() < deadline {
                if driver.queues[0].has_room(1) {
                    driver.queues[0].add(&ram, &[], &[1]);
                    if driver.has_to_kick(&ram, 0) {
                        kick();
                    }
                }
                while driver.queues[0].take(&ram).is_some() {
                    taken += 1;
                }
            }
            done.store(true, Ordering::SeqCst);
            kick();
            assert!(taken >= ROUNDS, "{taken}");
        });
        let mut events = mio::Events::with_capacity(4);
        while !done.load(Ordering::SeqCst) {
            host.poll.poll(&mut events, None).unwrap();
            events.iter().for_each(|event| assert!(devices.on_event(event)));
        }
    });
}
