//! Tables are found and checked as a kernel does: root pointer, XSDT, then each table.

use super::*;

struct Tables {
    ram: GuestRam,
}

impl Tables {
    fn new(vcpus: u8, slots: &[Slot]) -> Self {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write(&ram, vcpus, slots).unwrap();
        Self { ram }
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        assert_eq!(
            bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte)),
            0,
            "checksum at {address:#x}"
        );
        bytes
    }

    fn table(&self, address: u64) -> Vec<u8> {
        let len: u32 = self.ram.read_obj(GuestAddress(address + 4)).unwrap();
        assert!(address >= START && address + u64::from(len) <= END);
        self.bytes(address, len as usize)
    }

    fn find(&self, signature: &[u8]) -> Vec<u8> {
        let root = self.bytes(RSDP, 36);
        assert_eq!(&root[..8], b"RSD PTR ");
        assert_eq!(root[..20].iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte)), 0);
        let xsdt = self.table(u64::from_le_bytes(root[24..32].try_into().unwrap()));
        assert_eq!(&xsdt[..4], b"XSDT");
        let entries = xsdt[36..].chunks_exact(8).map(|e| u64::from_le_bytes(e.try_into().unwrap()));
        entries.map(|entry| self.table(entry)).find(|table| table.starts_with(signature)).unwrap()
    }
}

#[test]
fn the_fadt_denies_what_is_not_there_and_names_the_ports() {
    let tables = Tables::new(1, &[]);
    let fadt = tables.find(b"FACP");
    let boot_flags = u16::from_le_bytes([fadt[109], fadt[110]]);
    assert_eq!(boot_flags, 0x24, "no VGA, no CMOS clock, no 8042, no legacy devices");
    let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
    assert_ne!(flags & 1 << 20, 0, "hardware-reduced");
    assert_ne!(flags & 1 << 10, 0, "reset register");
    // Generic address: space 1 is I/O; the port follows three bytes on.
    for (at, port) in [(116, RESET_PORT), (244, SLEEP_CONTROL_PORT), (256, SLEEP_STATUS_PORT)] {
        assert_eq!((fadt[at], fadt[at + 1]), (1, 8));
        assert_eq!(u64::from_le_bytes(fadt[at + 4..at + 12].try_into().unwrap()), u64::from(port));
    }
    assert_eq!(fadt[128], RESET_VALUE);
    let dsdt = u64::from_le_bytes(fadt[140..148].try_into().unwrap());
    assert!(tables.table(dsdt).starts_with(b"DSDT"));
}

#[test]
fn the_madt_lists_each_vcpu_and_the_io_apic() {
    for vcpus in 1..=layout::MAX_VCPUS {
        let madt = Tables::new(vcpus, &Slot::ALL).find(b"APIC");
        let mut entries = &madt[44..];
        let mut ids = Vec::new();
        let mut io_apics = Vec::new();
        while let [kind, len, ..] = *entries {
            match kind {
                0 => ids.push((entries[2], entries[3], entries[4])),
                1 => io_apics.push(u32::from_le_bytes(entries[4..8].try_into().unwrap())),
                other => panic!("entry of type {other}"),
            }
            entries = &entries[usize::from(len)..];
        }
        assert_eq!(ids, (0..vcpus).map(|id| (id, id, 1)).collect::<Vec<_>>());
        assert_eq!(io_apics, [layout::IOAPIC_BASE as u32]);
    }
}

#[test]
fn the_dsdt_has_exactly_the_devices_asked_for() {
    for slots in [&[][..], &[Slot::Rng], &Slot::ALL] {
        let tables = Tables::new(1, slots);
        let fadt = tables.find(b"FACP");
        let dsdt = tables.table(u64::from_le_bytes(fadt[140..148].try_into().unwrap()));
        let count = |needle: &[u8]| dsdt.windows(needle.len()).filter(|window| *window == needle).count();
        assert_eq!(count(b"LNRO0005"), slots.len());
        assert_eq!(count(b"_S5_"), 1);
        for slot in Slot::ALL {
            // Memory32Fixed, read-write.
            let mut memory = vec![0x86, 9, 0, 1];
            memory.extend((slot.mmio_base() as u32).to_le_bytes());
            memory.extend((layout::VIRTIO_MMIO_SIZE as u32).to_le_bytes());
            // Interrupt: consumer, edge, active high, exclusive, one number.
            let mut interrupt = vec![0x89, 6, 0, 0b0011, 1];
            interrupt.extend(slot.gsi().to_le_bytes());
            let expected = usize::from(slots.contains(&slot));
            assert_eq!((count(&memory), count(&interrupt)), (expected, expected), "{slot:?}");
        }
    }
}
