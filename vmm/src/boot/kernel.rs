//! Takes a kernel file apart and puts the kernel into guest memory.
//!
//! Two formats: ELF (`vmlinux`), and bzImage, whose compressed payload is such an ELF. The payload is unpacked here, so
//! that neither the kernel's own decompressor runs in the guest nor its KASLR: a template is booted once and all its
//! forks share its addresses anyway.

use std::{
    fs::File,
    io::{Cursor, Read},
    ops::Range,
};

use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::unpack;
use crate::memory::GuestRam;

/// Longest kernel file in bytes.
pub const MAX_FILE: u64 = 512 << 20;

/// Lowest guest-physical address a kernel may use; below are the boot structures.
const MIN_ADDRESS: u64 = 0x10_0000;

/// Why a kernel cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read the kernel file")]
    Read(#[source] std::io::Error),
    /// The file is too long to be a kernel.
    #[error("the kernel file is longer than {} MiB; give a bzImage or a vmlinux without debug information", MAX_FILE >> 20)]
    TooLong,
    /// Neither ELF nor bzImage.
    #[error("the file is not a kernel: it is neither an x86-64 ELF (vmlinux) nor a bzImage (vmlinuz)")]
    NotAKernel,
    /// A bzImage of a boot protocol without payload fields.
    #[error("the bzImage has boot protocol {0:#06x}, older than 0x0208; use a kernel since Linux 2.6.26")]
    TooOld(u16),
    /// The bzImage's payload is not inside the file.
    #[error("the bzImage is truncated: its payload ends at byte {end} of a file of {len}")]
    Truncated {
        /// Where the payload should end.
        end: u64,
        /// Length of the file.
        len: u64,
    },
    /// The payload cannot be unpacked.
    #[error(transparent)]
    Unpack(#[from] unpack::Error),
    /// The ELF is of another machine, or has nothing to load.
    #[error("the kernel's ELF image is not usable: {0}")]
    BadElf(&'static str),
    /// The kernel needs more memory than the guest has.
    #[error(
        "the kernel does not fit: it needs {need_mib} MiB and the guest has {have_mib} MiB below 3 GiB; raise memory"
    )]
    DoesNotFit {
        /// End of the kernel in MiB.
        need_mib: u64,
        /// RAM below the hole in MiB.
        have_mib: u64,
    },
    /// The loader refused it.
    #[error("the kernel cannot be loaded")]
    Load(#[source] linux_loader::loader::Error),
}

/// Where a loaded kernel is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Guest-physical address of the 64-bit entry point.
    pub entry: u64,
    /// Guest-physical address of its first byte, at least 1 MiB.
    pub start: u64,
    /// Guest-physical address after its last byte, uninitialised data included.
    pub end: u64,
}

/// Reads a kernel file, takes the ELF out of it and loads it into `ram`.
pub fn load(file: &File, ram: &GuestRam) -> Result<Loaded, Error> {
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(Error::Read)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(Error::TooLong);
    }
    load_elf(&extract(bytes)?, ram)
}

/// The ELF image of a kernel file's bytes.
pub fn extract(bytes: Vec<u8>) -> Result<Vec<u8>, Error> {
    if bytes.starts_with(b"\x7FELF") {
        return Ok(bytes);
    }
    let payload = payload(&bytes)?;
    let image = unpack::unpack(payload)?;
    if image.starts_with(b"\x7FELF") { Ok(image) } else { Err(Error::BadElf("the payload is not an ELF")) }
}

/// The compressed payload of a bzImage, by its setup header (Linux Documentation/arch/x86/boot.rst, "The Real-Mode
/// Kernel Header" and the fields `setup_sects`, `payload_offset` and `payload_length`).
fn payload(bytes: &[u8]) -> Result<&[u8], Error> {
    const BOOT_FLAG: usize = 0x1FE;
    const MAGIC: usize = 0x202;
    const SETUP_SECTS: usize = 0x1F1;
    const VERSION: usize = 0x206;
    const PAYLOAD_OFFSET: usize = 0x248;
    const PAYLOAD_LENGTH: usize = 0x24C;
    if bytes.get(BOOT_FLAG..BOOT_FLAG + 2) != Some(&[0x55, 0xAA])
        || bytes.get(MAGIC..MAGIC + 4) != Some(b"HdrS")
    {
        return Err(Error::NotAKernel);
    }
    let version = bytes.get(VERSION..VERSION + 2).map_or(0, |v| u16::from_le_bytes([v[0], v[1]]));
    if version < 0x208 {
        return Err(Error::TooOld(version));
    }
    let offset = u64::from(le_u32(bytes, PAYLOAD_OFFSET).ok_or(Error::NotAKernel)?);
    let length = u64::from(le_u32(bytes, PAYLOAD_LENGTH).ok_or(Error::NotAKernel)?);
    // 0 means 4, for old loaders.
    let sectors = if bytes[SETUP_SECTS] == 0 { 4 } else { u64::from(bytes[SETUP_SECTS]) };
    // The boot sector is not counted in setup_sects.
    let start = (sectors + 1) * 512 + offset;
    let end = start + length;
    bytes.get(start as usize..end as usize).ok_or(Error::Truncated { end, len: bytes.len() as u64 })
}

fn le_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn le_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Checks the image's segments against the guest's memory before anything is written, then loads it.
fn load_elf(image: &[u8], ram: &GuestRam) -> Result<Loaded, Error> {
    let segments = segments(image, ram)?;
    let loaded = Elf::load(ram, None, &mut Cursor::new(image), Some(GuestAddress(MIN_ADDRESS)))
        .map_err(Error::Load)?;
    Ok(Loaded { entry: loaded.kernel_load.0, start: segments.start, end: segments.end })
}

/// From where to where segments are loaded (ELF-64 object file format, "ELF Header" and "Program Header").
fn segments(image: &[u8], ram: &GuestRam) -> Result<Range<u64>, Error> {
    const CLASS_64: u8 = 2;
    const LITTLE_ENDIAN: u8 = 1;
    const MACHINE_X86_64: [u8; 2] = [62, 0];
    const PT_LOAD: u32 = 1;
    const PHDR_LEN: usize = 56;
    let short = || Error::BadElf("it is truncated");
    if image.get(4..6) != Some(&[CLASS_64, LITTLE_ENDIAN]) || image.get(18..20) != Some(&MACHINE_X86_64) {
        return Err(Error::BadElf("it is not for x86-64"));
    }
    let table = usize::try_from(le_u64(image, 32).ok_or_else(short)?).map_err(|_| short())?;
    let count = image.get(56..58).map(|n| u16::from_le_bytes([n[0], n[1]])).ok_or_else(short)?;
    let low_ram = ram.find_region(GuestAddress(0)).ok_or(Error::BadElf("the guest has no memory at 0"))?;
    let have = vm_memory::GuestMemoryRegion::len(low_ram);
    let (mut start, mut end) = (u64::MAX, 0);
    for n in 0..usize::from(count) {
        let at = n.checked_mul(PHDR_LEN).and_then(|o| o.checked_add(table)).ok_or_else(short)?;
        let header = image.get(at..).and_then(|h| h.get(..PHDR_LEN)).ok_or_else(short)?;
        let field = |at| le_u64(header, at).ok_or_else(short);
        if le_u32(header, 0) != Some(PT_LOAD) {
            continue;
        }
        let (address, in_file, in_memory) = (field(24)?, field(32)?, field(40)?);
        if address < MIN_ADDRESS {
            return Err(Error::BadElf("a segment lies below 1 MiB"));
        }
        let after = address.checked_add(in_memory.max(in_file));
        start = start.min(address);
        end = end.max(after.ok_or(Error::BadElf("a segment wraps around"))?);
    }
    match end {
        0 => Err(Error::BadElf("it has no segment to load")),
        _ if end > have => Err(Error::DoesNotFit { need_mib: end.div_ceil(1 << 20), have_mib: have >> 20 }),
        _ => Ok(start..end),
    }
}

#[cfg(test)]
mod tests;
