//! Kernel files: real in structure, tiny in content.

use super::*;
use vm_memory::Bytes;

const LOAD: u64 = 0x100_0000;

/// An ELF for x86-64 with one segment of `code` at [`LOAD`] that takes `memory` bytes.
fn elf(code: &[u8], memory: u64) -> Vec<u8> {
    let mut image = vec![0; 64];
    image[..6].copy_from_slice(b"\x7FELF\x02\x01");
    image[16..20].copy_from_slice(&[2, 0, 62, 0]);
    image[24..32].copy_from_slice(&(LOAD + 2).to_le_bytes());
    image[32..40].copy_from_slice(&64_u64.to_le_bytes());
    image[54..58].copy_from_slice(&[56, 0, 1, 0]);
    let words = [1 | 5 << 32, 120, 0xFFFF_FFFF_8100_0000, LOAD, code.len() as u64, memory, 0x1000];
    image.extend(words.iter().flat_map(|word: &u64| word.to_le_bytes()));
    image.extend(code);
    image
}

/// A bzImage around a payload, by the fields of its setup header.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 1024];
    file[0x1F1] = 1;
    file[0x1FE..0x200].copy_from_slice(&[0x55, 0xAA]);
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x20F_u16.to_le_bytes());
    file[0x248..0x24C].copy_from_slice(&16_u32.to_le_bytes());
    file[0x24C..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    file.extend([0x90; 16]);
    file.extend(payload);
    file.extend([0xCC; 32]);
    file
}

fn file(bytes: &[u8]) -> File {
    use std::io::{Seek, Write};
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

fn ram(bytes: usize) -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), bytes)]).unwrap()
}

#[test]
fn vmlinux_and_bzimage_load_alike() {
    let image = elf(b"kernel code", 0x5000);
    let packed = bzimage(&super::super::unpack::tests::lz4(&image));
    for bytes in [image.clone(), packed] {
        let ram = ram(32 << 20);
        let loaded = load(&file(&bytes), &ram).unwrap();
        assert_eq!(loaded, Loaded { entry: LOAD + 2, start: LOAD, end: LOAD + 0x5000 });
        let mut code = [0; 11];
        ram.read_slice(&mut code, GuestAddress(LOAD)).unwrap();
        assert_eq!(&code, b"kernel code");
    }
}

#[test]
fn what_is_no_kernel_is_refused() {
    for bytes in [&b""[..], b"#!/bin/sh\n", &[0; 4096]] {
        assert!(matches!(load(&file(bytes), &ram(1 << 20)), Err(Error::NotAKernel)));
    }
    let mut other = elf(b"x", 1);
    other[18] = 183; // AArch64
    assert!(matches!(load(&file(&other), &ram(32 << 20)), Err(Error::BadElf(_))));
    assert!(matches!(load(&file(&elf(b"x", 1)[..80]), &ram(32 << 20)), Err(Error::BadElf(_))));
    let not_elf = bzimage(&super::super::unpack::tests::lz4(b"hello"));
    assert!(matches!(load(&file(&not_elf), &ram(32 << 20)), Err(Error::BadElf(_))));
}

#[test]
fn a_truncated_or_ancient_bzimage_is_named_so() {
    let whole = bzimage(&super::super::unpack::tests::lz4(&elf(b"x", 1)));
    let cut = &whole[..whole.len() - 40];
    assert!(matches!(load(&file(cut), &ram(32 << 20)), Err(Error::Truncated { .. })));
    let mut old = whole;
    old[0x206] = 0x04;
    assert!(matches!(load(&file(&old), &ram(32 << 20)), Err(Error::TooOld(0x204))));
}

#[test]
fn a_kernel_larger_than_memory_is_refused_before_anything_is_written() {
    let ram = ram(32 << 20);
    let error = load(&file(&elf(b"kernel", 100 << 20)), &ram).unwrap_err();
    assert!(matches!(error, Error::DoesNotFit { need_mib: 116, have_mib: 32 }), "{error}");
    assert_eq!(ram.read_obj::<u64>(GuestAddress(LOAD)).unwrap(), 0);
}

#[test]
fn segments_cannot_reach_the_boot_structures_or_wrap() {
    let mut low = elf(b"x", 1);
    low[64 + 24..64 + 32].copy_from_slice(&0x7000_u64.to_le_bytes());
    assert!(matches!(load(&file(&low), &ram(32 << 20)), Err(Error::BadElf(_))));
    let wrap = elf(b"x", u64::MAX);
    assert!(matches!(load(&file(&wrap), &ram(32 << 20)), Err(Error::BadElf(_))));
    let mut table = elf(b"x", 1);
    table[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(load(&file(&table), &ram(32 << 20)), Err(Error::BadElf(_))));
}
