//! The zero page: what the 64-bit boot protocol hands to the kernel (Linux Documentation/arch/x86/boot.rst and
//! zero-page.rst).

use linux_loader::bootparam::{SETUP_RNG_SEED, boot_e820_entry, boot_params};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{acpi, map};
use crate::memory::{GuestRam, layout};

/// E820 type of memory the kernel may use.
const E820_RAM: u32 = 1;

/// E820 type of memory that holds ACPI tables.
const E820_ACPI: u32 = 3;

/// Start of the legacy video and option ROM area; the kernel does not use RAM there.
const LEGACY_HOLE: u64 = 0xA_0000;

/// First byte after the legacy area.
const HIGH_MEMORY: u64 = 0x10_0000;

/// Length of the random seed in bytes.
pub const SEED_LEN: usize = 32;

/// Guest-physical place of the unpacked initramfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initramfs {
    /// Start, page aligned, below 3 GiB.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
}

/// The memory map of a guest with `memory_bytes` of RAM, in ascending order.
pub fn e820(memory_bytes: u64) -> Vec<boot_e820_entry> {
    let entry = |addr: u64, end: u64, r#type: u32| boot_e820_entry { addr, size: end - addr, r#type };
    let mut entries = vec![entry(0, LEGACY_HOLE, E820_RAM), entry(acpi::START, acpi::END, E820_ACPI)];
    entries.extend(layout::ram_regions(memory_bytes).iter().map(|region| {
        let start = region.gpa.max(HIGH_MEMORY);
        entry(start, region.gpa + region.len, E820_RAM)
    }));
    entries
}

/// The zero page's contents.
pub fn zero_page(memory_bytes: u64, initramfs: Initramfs, cmdline_len: usize) -> boot_params {
    const BOOT_FLAG: u16 = 0xAA55;
    const HEADER: u32 = u32::from_le_bytes(*b"HdrS");
    const PROTOCOL: u16 = 0x020F;
    const LOADER_UNDEFINED: u8 = 0xFF;
    const KERNEL_ALIGNMENT: u32 = 0x20_0000;
    let mut params = boot_params::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER;
    params.hdr.version = PROTOCOL;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    params.hdr.cmd_line_ptr = map::CMDLINE as u32;
    params.hdr.cmdline_size = cmdline_len as u32;
    params.hdr.ramdisk_image = initramfs.address as u32;
    params.hdr.ramdisk_size = initramfs.len as u32;
    params.hdr.setup_data = map::SETUP_DATA;
    params.acpi_rsdp_addr = acpi::RSDP;
    let entries = e820(memory_bytes);
    params.e820_entries = entries.len() as u8;
    for (slot, entry) in params.e820_table.iter_mut().zip(entries) {
        *slot = entry;
    }
    params
}

/// Writes the zero page, the command line and the random seed. The kernel wipes the seed after use.
pub fn write(
    ram: &GuestRam,
    memory_bytes: u64,
    initramfs: Initramfs,
    cmdline: &str,
    seed: &[u8; SEED_LEN],
) -> Result<(), GuestMemoryError> {
    ram.write_obj(zero_page(memory_bytes, initramfs, cmdline.len()), GuestAddress(map::ZERO_PAGE))?;
    ram.write_slice(cmdline.as_bytes(), GuestAddress(map::CMDLINE))?;
    ram.write_obj(0_u8, GuestAddress(map::CMDLINE + cmdline.len() as u64))?;
    // struct setup_data: next, type, len, then the data.
    ram.write_obj(0_u64, GuestAddress(map::SETUP_DATA))?;
    ram.write_obj(SETUP_RNG_SEED, GuestAddress(map::SETUP_DATA + 8))?;
    ram.write_obj(SEED_LEN as u32, GuestAddress(map::SETUP_DATA + 12))?;
    ram.write_slice(seed, GuestAddress(map::SETUP_DATA + 16))
}

#[cfg(test)]
mod tests;
