//! The processor state of the 64-bit boot protocol: long mode, flat segments, memory mapped one to one
//! (Linux Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").

use kvm_bindings::{kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{Entry, map};
use crate::memory::GuestRam;

/// Code selector the protocol demands (`__BOOT_CS`).
const BOOT_CS: u16 = 0x10;

/// Data selector the protocol demands (`__BOOT_DS`).
const BOOT_DS: u16 = 0x18;

/// Selector of the task state segment; never used, but VM entry wants one.
const BOOT_TR: u16 = 0x20;

/// 64-bit code, readable, accessed, present, ring 0.
const CODE: u64 = 0x00AF_9B00_0000_FFFF;

/// Data, writable, accessed, present, ring 0.
const DATA: u64 = 0x00CF_9300_0000_FFFF;

/// Busy 64-bit TSS at 0, present.
const TSS: u64 = 0x008F_8B00_0000_FFFF;

const CR0_PE: u64 = 1 << 0;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Page table entry: present and writable.
const PTE_TABLE: u64 = 0x3;

/// Page directory entry: present, writable, 2 MiB page.
const PDE_LARGE: u64 = 0x83;

/// GiB mapped one to one: all that is below the hole's end.
const MAPPED_GIB: u64 = 4;

/// Writes the descriptor table and the page tables.
pub fn write_tables(ram: &GuestRam) -> Result<(), GuestMemoryError> {
    // Two null descriptors: the protocol's selectors begin at 0x10. The TSS takes two slots.
    for (n, descriptor) in [0, 0, CODE, DATA, TSS, 0].into_iter().enumerate() {
        ram.write_obj::<u64>(descriptor, GuestAddress(map::GDT + n as u64 * 8))?;
    }
    ram.write_obj(map::PDPT | PTE_TABLE, GuestAddress(map::PML4))?;
    for gib in 0..MAPPED_GIB {
        let directory = map::PAGE_DIRECTORIES + gib * 0x1000;
        ram.write_obj(directory | PTE_TABLE, GuestAddress(map::PDPT + gib * 8))?;
        for n in 0..512 {
            let page = (gib << 30) | (n << 21);
            ram.write_obj(page | PDE_LARGE, GuestAddress(directory + n * 8))?;
        }
    }
    Ok(())
}

/// General registers at the kernel's 64-bit entry point.
pub fn regs(entry: Entry) -> kvm_regs {
    // Bit 1 always reads as one; interrupts are off.
    kvm_regs {
        rip: entry.rip,
        rsi: entry.rsi,
        rsp: map::STACK,
        rbp: map::STACK,
        rflags: 0x2,
        ..Default::default()
    }
}

/// Changes a new vCPU's system registers to the protocol's; what the protocol leaves open stays as KVM has it.
pub fn apply(sregs: &mut kvm_sregs) {
    let code = segment(CODE, BOOT_CS);
    let data = segment(DATA, BOOT_DS);
    sregs.cs = code;
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = segment(TSS, BOOT_TR);
    sregs.gdt.base = map::GDT;
    sregs.gdt.limit = 6 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_PG;
    sregs.cr3 = map::PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

/// The hidden part of a segment register, from its descriptor (Intel SDM vol. 3, 3.4.5).
fn segment(descriptor: u64, selector: u16) -> kvm_segment {
    let bits = |at: u32, count: u32| ((descriptor >> at) & ((1 << count) - 1)) as u8;
    let g = bits(55, 1);
    let limit = (descriptor & 0xFFFF) as u32 | (u32::from(bits(48, 4)) << 16);
    kvm_segment {
        base: 0,
        limit: if g == 1 { (limit << 12) | 0xFFF } else { limit },
        selector,
        type_: bits(40, 4),
        s: bits(44, 1),
        dpl: bits(45, 2),
        present: bits(47, 1),
        avl: bits(52, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g,
        unusable: 0,
        padding: 0,
    }
}

/// Floating-point state of a processor after FNINIT, with all SSE exceptions masked.
pub fn fpu() -> kvm_fpu {
    kvm_fpu { fcw: 0x37F, mxcsr: 0x1F80, ..Default::default() }
}

/// Model-specific registers that firmware would have set.
pub fn msrs() -> Vec<kvm_msr_entry> {
    const MISC_ENABLE: u32 = 0x1A0;
    const FAST_STRINGS: u64 = 1;
    const MTRR_DEF_TYPE: u32 = 0x2FF;
    const MTRR_ENABLED: u64 = 1 << 11;
    const WRITE_BACK: u64 = 6;
    [
        // Without it the kernel turns its fast string copies off on Intel.
        (MISC_ENABLE, FAST_STRINGS),
        // All memory write-back; without MTRRs the kernel would take RAM above the hole for uncached.
        (MTRR_DEF_TYPE, MTRR_ENABLED | WRITE_BACK),
    ]
    .into_iter()
    .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() })
    .collect()
}

#[cfg(test)]
mod tests;
