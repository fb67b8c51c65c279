use super::{Backend, MAX_SIZE, Pmem};
use crate::devices::testing::{Driver, Host};
use crate::devices::virtio::mmio::registers::STATUS;
use crate::memory::layout::{PMEM_ALIGN, PMEM_BASE, Slot};

#[test]
fn shows_the_image_and_flushes_it() {
    let mut host = Host::new();
    let mut driver = Driver::start(&host, Slot::Pmem, &[16]);
    let base = u64::from(host.read(Slot::Pmem, 0x100)) | u64::from(host.read(Slot::Pmem, 0x104)) << 32;
    assert_eq!(base, PMEM_BASE);
    assert_eq!(u64::from(host.read(Slot::Pmem, 0x108)), PMEM_ALIGN);
    driver.queues[0].add(&host.ram, &[&0_u32.to_le_bytes()], &[4]);
    driver.queues[0].add(&host.ram, &[&7_u32.to_le_bytes()], &[4]);
    driver.kick(&host, 0);
    host.pump();
    assert_eq!(driver.queues[0].take(&host.ram).unwrap().1, 0_u32.to_le_bytes());
    assert_eq!(driver.queues[0].take(&host.ram).unwrap().1, 1_u32.to_le_bytes());
}

#[test]
fn a_short_request_stops_the_device() {
    for (readable, writable) in [(3, 4), (4, 3)] {
        let mut host = Host::new();
        let mut driver = Driver::start(&host, Slot::Pmem, &[16]);
        driver.queues[0].add(&host.ram, &[&[0; 4][..readable]], &[writable]);
        driver.kick(&host, 0);
        host.pump();
        assert_eq!(host.read(Slot::Pmem, STATUS), 15 | 64);
    }
}

#[test]
fn only_possible_sizes_are_taken() {
    for size in [0, 4096, PMEM_ALIGN + 1, MAX_SIZE + PMEM_ALIGN, u64::MAX] {
        assert!(Pmem::new(Backend { size }).is_err());
    }
    assert!(Pmem::new(Backend { size: MAX_SIZE }).is_ok());
}
