//! All of boot at once, into memory of every size, as far as it can be seen without a vCPU.

use std::io::{Seek, Write};

use linux_loader::bootparam::boot_params;

use super::*;

/// A program for x86-64 at 16 MiB, as an ELF.
fn kernel() -> File {
    let mut image = vec![0; 64];
    image[..6].copy_from_slice(b"\x7FELF\x02\x01");
    image[16..20].copy_from_slice(&[2, 0, 62, 0]);
    image[24..32].copy_from_slice(&0x100_0000_u64.to_le_bytes());
    image[32..40].copy_from_slice(&64_u64.to_le_bytes());
    image[54..58].copy_from_slice(&[56, 0, 1, 0]);
    let words = [1 | 5 << 32, 120, 0xFFFF_FFFF_8100_0000, 0x100_0000, 1, 0x80_0000, 0x1000_u64];
    image.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    image.push(0xF4);
    file(&image)
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

fn ram(bytes: u64) -> GuestRam {
    let ranges: Vec<_> =
        layout::ram_regions(bytes).iter().map(|r| (GuestAddress(r.gpa), r.len as usize)).collect();
    GuestRam::from_ranges(&ranges).unwrap()
}

#[test]
fn initramfs_lies_at_the_end_of_low_memory() {
    for mib in [64, 3 * 1024, 8 * 1024, 64 * 1024_u64] {
        let bytes = mib << 20;
        let ram = ram(bytes);
        let content = [0x5A; 5000];
        let entry = load(&kernel(), &file(&content), "", 8, &Slot::ALL, &ram, bytes).unwrap();
        assert_eq!(entry.rip, 0x100_0000);
        let page: boot_params = ram.read_obj(GuestAddress(entry.rsi)).unwrap();
        let at = u64::from(page.hdr.ramdisk_image);
        assert_eq!(at, bytes.min(layout::LOW_RAM_END) - 8192);
        let mut found = [0; 5000];
        ram.read_slice(&mut found, GuestAddress(at)).unwrap();
        assert_eq!(found, content);
    }
}

#[test]
fn an_initramfs_that_reaches_the_kernel_is_refused() {
    let bytes = 64 << 20;
    let big = file(&[]);
    big.set_len(41 << 20).unwrap();
    let error = load(&kernel(), &big, "", 1, &[], &ram(bytes), bytes).unwrap_err();
    assert!(matches!(error, Error::InitramfsTooBig { have: 41_943_040, .. }), "{error}");
    big.set_len(40 << 20).unwrap();
    load(&kernel(), &big, "", 1, &[], &ram(bytes), bytes).unwrap();
}

#[test]
fn in_a_small_guest_the_initramfs_lies_before_the_kernel() {
    let bytes = 25 << 20;
    let ram = ram(bytes);
    let entry = load(&kernel(), &file(&[0x5A; 2 << 20]), "", 1, &[], &ram, bytes).unwrap();
    let page: boot_params = ram.read_obj(GuestAddress(entry.rsi)).unwrap();
    assert_eq!({ page.hdr.ramdisk_image }, 14 << 20);
}

#[test]
fn two_boots_get_different_seeds() {
    let bytes = 64 << 20;
    let seed = || {
        let ram = ram(bytes);
        load(&kernel(), &file(&[]), "", 1, &[], &ram, bytes).unwrap();
        ram.read_obj::<[u8; params::SEED_LEN]>(GuestAddress(map::SETUP_DATA + 16)).unwrap()
    };
    assert_ne!(seed(), seed());
}
