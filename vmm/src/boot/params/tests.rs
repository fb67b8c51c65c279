//! The memory map and the zero page, read as the kernel reads them.

use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn map(memory: u64) -> Vec<(u64, u64, u32)> {
    e820(memory).iter().map(|e| ({ e.addr }, { e.addr } + { e.size }, { e.r#type })).collect()
}

#[test]
fn e820_follows_the_layout() {
    let low = [(0, 0xA_0000, E820_RAM), (0xE_0000, 0x10_0000, E820_ACPI)];
    for (memory, high) in [
        (64 * MIB, vec![(MIB, 64 * MIB, E820_RAM)]),
        (3 * GIB, vec![(MIB, 3 * GIB, E820_RAM)]),
        (8 * GIB, vec![(MIB, 3 * GIB, E820_RAM), (4 * GIB, 9 * GIB, E820_RAM)]),
        (64 * GIB, vec![(MIB, 3 * GIB, E820_RAM), (4 * GIB, 65 * GIB, E820_RAM)]),
    ] {
        let expected: Vec<_> = low.into_iter().chain(high).collect();
        assert_eq!(map(memory), expected, "{} MiB", memory / MIB);
    }
}

#[test]
fn the_zero_page_names_what_was_written() {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let initramfs = Initramfs { address: 0x300_0000, len: 1234 };
    write(&ram, 64 * MIB, initramfs, "quiet", &[7; SEED_LEN]).unwrap();
    let page: boot_params = ram.read_obj(GuestAddress(map::ZERO_PAGE)).unwrap();
    assert_eq!({ page.hdr.boot_flag }, 0xAA55);
    assert_eq!({ page.hdr.header }.to_le_bytes(), *b"HdrS");
    assert_eq!((page.hdr.ramdisk_image, page.hdr.ramdisk_size), (0x300_0000, 1234));
    assert_eq!({ page.acpi_rsdp_addr }, 0xE_0000);
    assert_eq!(page.e820_entries, 3);
    let mut line = [0xFF; 6];
    ram.read_slice(&mut line, GuestAddress(u64::from(page.hdr.cmd_line_ptr))).unwrap();
    assert_eq!(&line, b"quiet\0");
    let seed = page.hdr.setup_data;
    let header: [u32; 4] = ram.read_obj(GuestAddress(seed)).unwrap();
    assert_eq!(header, [0, 0, SETUP_RNG_SEED, SEED_LEN as u32]);
    assert_eq!(ram.read_obj::<[u8; SEED_LEN]>(GuestAddress(seed + 16)).unwrap(), [7; SEED_LEN]);
}
