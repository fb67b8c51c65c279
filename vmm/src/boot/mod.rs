//! From a kernel file to a machine ready for its first instruction.
//!
//! There is no firmware: the kernel's ELF image, the tables it expects and the processor state of the 64-bit boot
//! protocol are put in place directly. Application processors need nothing; KVM has them wait for the kernel's SIPI.

pub mod acpi;
pub mod cmdline;
pub mod kernel;
pub mod long_mode;
pub mod null;
mod params;
mod unpack;

use std::{fs::File, io, ops::Range};

use kvm_bindings::kvm_regs;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::{
    GuestRam,
    layout::{self, Slot},
};
use params::Initramfs;

/// Guest-physical addresses of what boot leaves in low memory; the kernel reclaims all of it.
mod map {
    /// Global descriptor table.
    pub const GDT: u64 = 0x500;
    /// Zero page.
    pub const ZERO_PAGE: u64 = 0x7000;
    /// Stack pointer at entry; the kernel brings its own at once.
    pub const STACK: u64 = 0x8FF0;
    /// Top-level page table.
    pub const PML4: u64 = 0x9000;
    /// Second-level page table.
    pub const PDPT: u64 = 0xA000;
    /// Four third-level page tables.
    pub const PAGE_DIRECTORIES: u64 = 0xB000;
    /// Command line, at most 2 KiB.
    pub const CMDLINE: u64 = 0x2_0000;
    /// The one setup_data node: the random seed.
    pub const SETUP_DATA: u64 = 0x2_1000;
}

/// Why a guest cannot be made ready to boot.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel file.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// The command line.
    #[error(transparent)]
    Cmdline(#[from] cmdline::Error),
    /// The initramfs file cannot be read.
    #[error("cannot read the initramfs")]
    Initramfs(#[source] io::Error),
    /// The initramfs file changed or ended while it was read into the guest.
    #[error("cannot copy the initramfs into guest memory")]
    InitramfsCopy(#[source] GuestMemoryError),
    /// The initramfs does not fit behind the kernel.
    #[error(
        "the initramfs of {need} bytes does not fit: {have} bytes are free after the kernel; raise memory"
    )]
    InitramfsTooBig {
        /// Its length in bytes.
        need: u64,
        /// Length of the longest free piece below 3 GiB in bytes.
        have: u64,
    },
    /// The kernel gave no random bytes for the guest's seed.
    #[error("this host gives no random bytes")]
    Random(#[source] io::Error),
    /// The boot structures could not be written: the guest's memory has no first MiB.
    #[error("cannot write the boot structures into guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// Where the boot processor begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Guest-physical address of the kernel's 64-bit entry point.
    pub rip: u64,
    /// Guest-physical address of the zero page.
    pub rsi: u64,
}

impl Entry {
    /// General registers of the boot processor. System registers: [`long_mode::apply`].
    pub fn regs(&self) -> kvm_regs {
        long_mode::regs(*self)
    }
}

/// Loads kernel and initramfs into `ram` and writes all that the kernel expects beside them.
///
/// `cmdline` is appended to the built-in words, `vcpus` is 1 to [`layout::MAX_VCPUS`], `slots` are the virtio-mmio
/// devices the guest shall find, `memory_bytes` is the size of `ram`, which is new (all zero).
pub fn load(
    kernel: &File,
    initramfs: &File,
    cmdline: &str,
    vcpus: u8,
    slots: &[Slot],
    ram: &GuestRam,
    memory_bytes: u64,
) -> Result<Entry, Error> {
    assert!((1..=layout::MAX_VCPUS).contains(&vcpus), "the number of vCPUs was checked");
    let cmdline = cmdline::build(cmdline)?;
    let loaded = kernel::load(kernel, ram)?;
    let initramfs = load_initramfs(initramfs, loaded, ram, memory_bytes)?;
    let mut seed = [0; params::SEED_LEN];
    rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| Error::Random(e.into()))?;
    params::write(ram, memory_bytes, initramfs, &cmdline, &seed)?;
    acpi::write(ram, vcpus, slots)?;
    long_mode::write_tables(ram)?;
    Ok(Entry { rip: loaded.entry, rsi: map::ZERO_PAGE })
}

/// Copies the initramfs to the end of the RAM below the hole, or, in a small guest, between the first MiB and the
/// kernel.
fn load_initramfs(
    file: &File,
    kernel: kernel::Loaded,
    ram: &GuestRam,
    memory_bytes: u64,
) -> Result<Initramfs, Error> {
    let need = file.metadata().map_err(Error::Initramfs)?.len();
    let after = kernel.end.next_multiple_of(layout::PAGE)..memory_bytes.min(layout::LOW_RAM_END);
    let before = layout::MIB..kernel.start;
    let room = |place: &Range<u64>| place.end.saturating_sub(place.start);
    let Some(place) = [&after, &before].into_iter().find(|place| need <= room(place)) else {
        return Err(Error::InitramfsTooBig { need, have: room(&after).max(room(&before)) });
    };
    // Both places begin at a page, so rounding down stays inside.
    let address = (place.end - need) & !(layout::PAGE - 1);
    let mut file = file;
    ram.read_exact_volatile_from(GuestAddress(address), &mut file, need as usize)
        .map_err(Error::InitramfsCopy)?;
    Ok(Initramfs { address, len: need })
}

#[cfg(test)]
mod tests;
