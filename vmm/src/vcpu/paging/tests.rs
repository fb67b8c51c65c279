use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::boot::null;

fn ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
}

#[test]
fn large_pages_of_the_null_guest() {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap();
    null::load(&[0xF4], &ram).unwrap();
    assert_eq!(translate(&ram, 0x1000, 0x20_1234), Some(0x20_1234));
    assert_eq!(translate(&ram, 0x1000, 1 << 30), None);
}

#[test]
fn small_pages() {
    let ram = ram();
    for (table, index, entry) in
        [(0x1000, 1, 0x2007), (0x2000, 2, 0x3007), (0x3000, 3, 0x4007), (0x4000, 4, 0x5_5007_u64)]
    {
        ram.write_obj(entry, GuestAddress(table + index * 8)).unwrap();
    }
    let gva = (1 << 39) | (2 << 30) | (3 << 21) | (4 << 12) | 0xABC;
    assert_eq!(translate(&ram, 0x1000, gva), Some(0x5_5ABC));
    assert_eq!(translate(&ram, 0x1000, gva + PAGE), None);
}

#[test]
fn tables_outside_of_memory_end_the_walk() {
    let ram = ram();
    ram.write_obj(0x000F_FFFF_FFFF_F007_u64, GuestAddress(0x1000)).unwrap();
    assert_eq!(translate(&ram, 0x1000, 0), None);
    assert_eq!(translate(&ram, u64::MAX, 0), None);
}
