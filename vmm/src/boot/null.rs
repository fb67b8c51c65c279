//! The null guest's machine: no kernel, one flat program in user mode.
//!
//! User mode, because that is what every KVM runs natively, PVM included. The first GiB is mapped one to one with
//! 2 MiB pages whose accessed and dirty bits are set, so that the tables themselves are never written.
//!
//! `out` is allowed twice over: by I/O privilege level 3, and by an I/O permission bitmap in the task state segment,
//! because PVM forgets the level and QEMU's emulation misreads the segment.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestRam;

/// Guest-physical address at which the program is loaded and entered.
pub const LOAD_ADDRESS: u64 = 0x10_0000;

/// Longest program in bytes; its mailbox follows at 2 MiB.
pub const MAX_PROGRAM: usize = 0x10_0000;

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
/// The task state segment; its permission bitmap (all zero: all ports allowed) begins at [`IO_BITMAP`].
const TSS: u64 = 0x4000;
/// Offset of the bitmap (AMD64 manual volume 2, section 12.2.4), and of the field that says so.
const IO_BITMAP: u16 = 104;
const IO_BITMAP_FIELD: u64 = 102;
/// Segment limit: the fixed part, 65536 bits, and the byte of ones that ends them.
const TSS_LIMIT: u32 = IO_BITMAP as u32 + 8192;
/// Present, writable, user, accessed (Intel SDM volume 3, table 4-15).
const TABLE: u64 = 0x27;
/// The same, dirty, and a page of 2 MiB.
const LARGE_PAGE: u64 = 0xE7;

/// Writes page tables and program.
///
/// # Errors
/// When guest memory is too small, which the layout's minimum excludes.
pub fn load(program: &[u8], ram: &GuestRam) -> Result<(), vm_memory::GuestMemoryError> {
    ram.write_obj(PDPT | TABLE, GuestAddress(PML4))?;
    ram.write_obj(PD | TABLE, GuestAddress(PDPT))?;
    for entry in 0..512_u64 {
        ram.write_obj((entry << 21) | LARGE_PAGE, GuestAddress(PD + entry * 8))?;
    }
    ram.write_obj(IO_BITMAP, GuestAddress(TSS + IO_BITMAP_FIELD))?;
    ram.write_obj(u8::MAX, GuestAddress(TSS + u64::from(TSS_LIMIT)))?;
    ram.write_slice(program, GuestAddress(LOAD_ADDRESS))
}

/// Registers on entry: the program, with I/O privilege.
pub fn registers() -> kvm_regs {
    /// Bit 1 is always set; I/O privilege level 3 (bits 12 and 13) allows `out` from user mode.
    const RFLAGS: u64 = 0x3002;
    kvm_regs { rip: LOAD_ADDRESS, rflags: RFLAGS, rsp: LOAD_ADDRESS, ..Default::default() }
}

/// Puts the vCPU into 64-bit user mode over the page tables of [`load`].
pub fn enter_user_mode(sregs: &mut kvm_sregs) {
    const USER_CODE: u16 = 0x33;
    const USER_DATA: u16 = 0x2B;
    let flat = |selector, type_, long: bool| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 3,
        s: 1,
        l: u8::from(long),
        db: u8::from(!long),
        g: 1,
        ..Default::default()
    };
    sregs.cs = flat(USER_CODE, 11, true);
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = flat(USER_DATA, 3, false);
    }
    // VMX refuses to enter a guest without a busy task register.
    sregs.tr = kvm_segment {
        base: TSS,
        limit: TSS_LIMIT,
        selector: 0x40,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };
    sregs.gdt = kvm_dtable::default();
    sregs.idt = kvm_dtable::default();
    // Protected mode, extension type, write protect, paging; physical address extension; long mode enabled, active.
    sregs.cr0 = 0x8001_0011;
    sregs.cr3 = PML4;
    sregs.cr4 = 0x20;
    sregs.efer = 0x500;
}
