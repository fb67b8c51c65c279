//! What holds for every device: restore takes back what save gave, and refuses anything else.

use super::testing::{Driver, Host};
use super::virtio::mmio::MmioState;
use super::*;
use crate::memory::layout::{HIGH_RAM_START, PMEM_ALIGN, SERIAL_PORT};

/// A host whose devices all run and have been used.
fn used_host() -> Host {
    let mut host = Host::new();
    for (slot, sizes) in [
        (Slot::Vsock, &[256, 256, 16][..]),
        (Slot::Pmem, &[16]),
        (Slot::Rng, &[16]),
        (Slot::Net, &[256, 256]),
    ] {
        let mut driver = Driver::start(&host, slot, sizes);
        let queue = sizes.len() - 2.min(sizes.len());
        driver.queues[queue].add(&host.ram, &[&[0; 44]], &[64]);
        driver.kick(&host, queue);
    }
    host.pump();
    let _ = host.devices.pio_write(SERIAL_PORT + 1, &[2]);
    let _ = host.devices.pio_write(SERIAL_PORT, b"booted\n");
    let _ = host.devices.pio_write(super::cmos::INDEX_PORT, &[0x0A]);
    host
}

type Damage<T> = fn(&mut T);

/// Every way to damage a running device's transport so that restore can tell.
fn transport_damages<S>() -> Vec<(&'static str, Damage<MmioState<S>>)> {
    vec![
        ("status out of order", |s| s.status = 5),
        ("unknown status bit", |s| s.status |= 16),
        ("features not offered", |s| s.driver_features |= 1 << 40),
        ("features without version 1", |s| s.driver_features = 0),
        ("unknown interrupt", |s| s.interrupt_status |= 4),
        ("a queue missing", |s| s.queues.truncate(s.queues.len() - 1)),
        ("a queue too many", |s| s.queues.push(s.queues[0])),
        ("size 0", |s| s.queues[0].size = 0),
        ("size no power of two", |s| s.queues[0].size -= 1),
        ("size too large", |s| s.queues[0].size *= 2),
        ("ready before features", |s| (s.status, s.driver_features) = (3, 0)),
        ("positions apart", |s| s.queues[0].next_avail = s.queues[0].next_avail.wrapping_add(1)),
        ("positions apart the other way", |s| s.queues[0].next_used = s.queues[0].next_used.wrapping_add(1)),
        ("descriptors misaligned", |s| s.queues[0].desc_table += 1),
        ("available ring misaligned", |s| s.queues[0].avail_ring += 1),
        ("used ring misaligned", |s| s.queues[0].used_ring += 2),
        ("descriptors outside RAM", |s| s.queues[0].desc_table = HIGH_RAM_START),
        ("available ring outside RAM", |s| s.queues[0].avail_ring = HIGH_RAM_START),
        ("available ring nowhere", |s| s.queues[0].avail_ring = 0),
        ("used ring outside RAM", |s| s.queues[0].used_ring = u64::MAX - 3),
        ("descriptors across the end of RAM", |s| s.queues[0].desc_table = super::testing::RAM_SIZE - 16),
    ]
}

/// Tests of one device's state: `virtio` devices are damaged in their transport too.
macro_rules! conformance {
    ($device:ident, virtio $(, $damage:expr)*) => {
        conformance!(@tests $device, |states: &mut DeviceStates, index: usize| {
            let damages = transport_damages();
            let own: Vec<(&str, Damage<DeviceStates>)> = vec![$($damage),*];
            if let Some((name, damage)) = damages.get(index) {
                damage(conformance!(@transport $device, states));
                return Some(*name);
            }
            let (name, damage) = own.get(index - damages.len())?;
            damage(states);
            Some(*name)
        });
    };
    ($device:ident, plain $(, $damage:expr)*) => {
        conformance!(@tests $device, |states: &mut DeviceStates, index: usize| {
            let own: Vec<(&str, Damage<DeviceStates>)> = vec![$($damage),*];
            let (name, damage) = own.get(index)?;
            damage(states);
            Some(*name)
        });
    };
    (@transport pmem, $states:ident) => { $states.pmem.as_mut().unwrap() };
    (@transport net, $states:ident) => { $states.net.as_mut().unwrap() };
    (@transport $device:ident, $states:ident) => { &mut $states.$device };
    (@tests $device:ident, $damage:expr) => {
        mod $device {
            use super::*;

            #[test]
            fn restores_what_it_saved() {
                let host = used_host();
                let saved = host.devices.save();
                assert_eq!(host.devices.save().$device, saved.$device, "saving changes nothing");
                let fork = host.fork(&saved).unwrap();
                assert_eq!(fork.devices.save().$device, saved.$device);
                let text = serde_json::to_string(&saved).unwrap();
                let decoded: DeviceStates = serde_json::from_str(&text).unwrap();
                assert_eq!(decoded.$device, saved.$device);
            }

            #[test]
            fn refuses_damage() {
                let host = used_host();
                let saved = host.devices.save();
                assert!(host.restores(&saved));
                let mut count = 0;
                loop {
                    let mut states = saved.clone();
                    let damage = $damage;
                    let Some(name) = damage(&mut states, count) else { break };
                    assert_ne!(states, saved, "{name}");
                    assert!(!host.restores(&states), "{name}");
                    count += 1;
                }
                assert!(count > 0);
            }
        }
    };
}

conformance!(
    vsock,
    virtio,
    ("port of a service", |s| s.vsock.device.last_port = 1024),
    ("port of no one", |s| s.vsock.device.last_port = u32::MAX)
);
conformance!(
    pmem,
    virtio,
    ("another size", |s| s.pmem.as_mut().unwrap().device.size += PMEM_ALIGN),
    ("device gone", |s| s.pmem = None)
);
conformance!(rng, virtio);
conformance!(
    net,
    virtio,
    ("an MTU that nobody has", |s| s.net.as_mut().unwrap().device.mtu = 67),
    ("device gone", |s| s.net = None)
);
conformance!(cmos, plain, ("index", |s| s.cmos.index = 0x80));
conformance!(
    serial,
    plain,
    ("interrupt enable", |s| s.serial.interrupt_enable = 0x10),
    ("interrupt cause", |s| s.serial.interrupt_identification = 3),
    ("line status", |s| s.serial.line_status ^= 1),
    ("modem status", |s| s.serial.modem_status ^= 1),
    ("fifo", |s| s.serial.in_buffer = vec![0; 65])
);

#[test]
fn the_root_image_must_fit_the_template() {
    let (poll, ram) = (mio::Poll::new().unwrap(), super::testing::ram());
    let backends = || super::testing::backends(&poll);
    let backends = || Backends { net: None, ..backends() };
    let without = || Backends { pmem: None, ..backends() };
    let new = |pmem, backends| Devices::new(&DeviceConfig { pmem, net: false }, backends, ram.clone());
    assert!(matches!(new(false, backends()), Err(Error::Root { given: true })));
    assert!(matches!(new(true, without()), Err(Error::Root { given: false })));
    let plain = new(false, without()).unwrap();
    assert_eq!((plain.interrupts().count(), plain.kicks().count()), (3, 1));
    let states = plain.save();
    assert_eq!(states.pmem, None);
    assert!(Devices::restore(&states, without(), ram.clone()).is_ok());
    assert!(matches!(Devices::restore(&states, backends(), ram.clone()), Err(Error::Root { given: true })));
    let mut id = [0; 4];
    plain.mmio_read(Slot::Pmem.mmio_base() + 8, &mut id);
    assert_eq!(id, [0; 4]);
}

#[test]
fn a_fork_finishes_what_was_kicked_and_repeats_what_was_not_acknowledged() {
    let mut host = Host::new();
    let mut driver = Driver::start(&host, Slot::Rng, &[16]);
    driver.queues[0].add(&host.ram, &[], &[16]);
    driver.kick(&host, 0);
    // Frozen before the event loop saw the kick.
    let states = host.devices.save();
    let fork = host.fork(&states).unwrap();
    fork.devices.kick();
    let mut in_fork = driver.clone();
    assert_eq!(in_fork.queues[0].take(&fork.ram).unwrap().1.len(), 16);
    assert_eq!(fork.interrupts(Slot::Rng), 1);

    host.pump();
    assert_eq!(host.interrupts(Slot::Rng), 1);
    // Frozen with the interrupt on its way.
    let fork = host.fork(&host.devices.save()).unwrap();
    fork.devices.kick();
    assert_eq!(fork.interrupts(Slot::Rng), 1);
}

#[test]
fn a_fork_of_a_guest_at_rest_gets_no_interrupt() {
    let mut host = used_host();
    host.devices.settle();
    for slot in Slot::ALL {
        host.write(slot, 0x64, 3);
    }
    let _ = host.devices.pio_write(SERIAL_PORT + 1, &[0]);
    host.pump();
    let fork = host.fork(&host.devices.save()).unwrap();
    fork.devices.interrupts().for_each(|(_, line)| drop(line.read()));
    fork.devices.kick();
    for (gsi, line) in fork.devices.interrupts() {
        assert!(line.read().is_err(), "GSI {gsi}");
    }
}

#[test]
fn resets_are_told_from_other_writes() {
    let host = Host::new();
    let write = |port, value| host.devices.pio_write(port, &[value]);
    assert_eq!(write(0x64, 0xFE), Effect::Reset);
    assert_eq!(write(0xCF9, 0x06), Effect::Reset);
    assert_eq!(write(0xF08, 0x34), Effect::Reset);
    for (port, value) in
        [(0x64, 0xD4), (0x60, 0xFE), (0xCF9, 0x02), (0xF08, 0x14), (0xF09, 0x34), (0x80, 0xFE)]
    {
        assert_eq!(write(port, value), Effect::None, "{port:#x}");
    }
}

#[test]
fn nobody_answers_with_ones() {
    let host = Host::new();
    let mut data = [0; 4];
    host.devices.pio_read(0xCFC, &mut data);
    assert_eq!(data, [0xFF; 4]);
    for gpa in [0xC000_0000, 0xD000_4000, 0xFED0_0000, u64::MAX] {
        let mut data = [0; 8];
        host.devices.mmio_read(gpa, &mut data);
        assert_eq!(data, [0xFF; 8], "{gpa:#x}");
        host.devices.mmio_write(gpa, &data);
    }
    host.devices.pio_read(0x64, &mut data);
    assert_eq!(data, [0; 4]);
}

#[test]
fn the_console_is_at_its_ports() {
    let host = Host::new();
    let _ = host.devices.pio_write(SERIAL_PORT, b"repeated out");
    assert_eq!(host.devices.console(0, 100), (0..12, b"repeated out".to_vec()));
    let mut status = [0];
    host.devices.pio_read(SERIAL_PORT + 5, &mut status);
    assert_eq!(status, [0x60]);
    host.devices.pio_read(SERIAL_PORT + 8, &mut status);
    assert_eq!(status, [0xFF]);
}

#[test]
fn devices_are_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<Devices>();
}
