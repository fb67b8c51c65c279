//! Tables are walked as the processor walks them.

use super::*;

fn ram() -> GuestRam {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    write_tables(&ram).unwrap();
    ram
}

#[test]
fn all_of_the_first_four_gib_is_mapped_one_to_one() {
    let ram = ram();
    let entry = |table: u64, index: u64| ram.read_obj::<u64>(GuestAddress(table + index * 8)).unwrap();
    for address in [0, 0x7000, 0x10_0000, 0x100_0000, 0x3FFF_FFFF, 0x4000_0000, 0xD000_0000, 0xFFFF_FFFF_u64]
    {
        let pdpt = entry(map::PML4, address >> 39) & !0xFFF;
        let directory = entry(pdpt, (address >> 30) & 511) & !0xFFF;
        let page = entry(directory, (address >> 21) & 511);
        assert_eq!(page & 0x83, 0x83, "{address:#x} is a present, writable 2 MiB page");
        assert_eq!(page & !0x1F_FFFF, address & !0x1F_FFFF);
    }
    assert_eq!(entry(map::PML4, 1), 0);
}

#[test]
fn selectors_name_descriptors_with_the_same_content() {
    let ram = ram();
    let mut sregs = kvm_sregs::default();
    apply(&mut sregs);
    for segment in [sregs.cs, sregs.ds, sregs.ss, sregs.tr] {
        assert!(u64::from(segment.selector) + 7 <= u64::from(sregs.gdt.limit));
        let descriptor: u64 =
            ram.read_obj(GuestAddress(sregs.gdt.base + u64::from(segment.selector))).unwrap();
        assert_eq!(segment.type_, ((descriptor >> 40) & 0xF) as u8);
        assert_eq!((segment.present, segment.dpl), (1, 0));
    }
    assert_eq!((sregs.cs.selector, sregs.ds.selector), (0x10, 0x18));
    assert_eq!((sregs.cs.l, sregs.cs.db), (1, 0));
    assert_eq!(sregs.tr.type_, 11);
    assert_eq!(sregs.cr3, map::PML4);
    assert_eq!(sregs.cr0 & 0x8000_0001, 0x8000_0001);
    assert_eq!(sregs.efer, 0x500);
}

#[test]
fn the_kernel_finds_the_zero_page() {
    let regs = regs(Entry { rip: 0x100_0000, rsi: map::ZERO_PAGE });
    assert_eq!((regs.rip, regs.rsi, regs.rflags), (0x100_0000, 0x7000, 2));
}
