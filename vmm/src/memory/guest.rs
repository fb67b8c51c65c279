//! A guest's memory in this process: one mapping, seen by KVM as memslots and by devices as [`GuestRam`].

use std::{io, os::fd::AsFd};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{
    GuestRam,
    layout::{self, RamRegion},
};
use crate::sys::mapping::Mapping;

/// The memory of one guest.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    mapping: Mapping,
    regions: Vec<RamRegion>,
    ram: GuestRam,
}

impl GuestMemory {
    /// Fresh zeroed memory, for booting a template.
    pub fn fresh(bytes: u64) -> io::Result<Self> {
        Ok(Self::over(Mapping::anonymous(bytes as usize)?, bytes))
    }

    /// A copy-on-write view of an image of `bytes` bytes.
    pub fn copy_on_write(image: impl AsFd, bytes: u64) -> io::Result<Self> {
        Ok(Self::over(Mapping::copy_on_write(image, bytes as usize)?, bytes))
    }

    fn over(mapping: Mapping, bytes: u64) -> Self {
        let regions = layout::ram_regions(bytes);
        let pieces =
            regions.iter().map(|r| mapping.guest_region(r.offset as usize, r.len as usize, r.gpa)).collect();
        let ram = GuestRam::from_regions(pieces).expect("layout's regions are disjoint and in order");
        Self { mapping, regions, ram }
    }

    /// Checked access for devices and loaders.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The host mapping; offset 0 is offset 0 of the image.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Where the mapping's pieces are in the guest.
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// Copies out of the memory at an offset of the image.
    ///
    /// # Errors
    /// When the range is not inside the memory or crosses the hole, which no chunk does.
    pub fn read_image(&self, offset: u64, buffer: &mut [u8]) -> Result<(), GuestMemoryError> {
        let region = self.regions.iter().find(|region| offset.wrapping_sub(region.offset) < region.len);
        let region = region.ok_or(GuestMemoryError::InvalidGuestAddress(GuestAddress(offset)))?;
        self.ram.read_slice(buffer, GuestAddress(region.gpa + offset - region.offset))
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.mapping.len() as u64
    }
}
