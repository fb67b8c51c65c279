//! A guest's memory in this process: one mapping, seen by KVM as memslots and by devices as [`GuestRam`].

use std::{
    fs::File,
    io,
    ops::Range,
    os::{fd::AsFd, unix::fs::FileExt},
};

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::{
    GuestRam,
    folded::Folded,
    large,
    layout::{self, RamRegion},
};
use crate::sys::{
    mapping::{LARGE_PAGE, Mapping},
    pagemap::{Pagemap, Pages, total},
    uffd::Uffd,
};

/// Bytes copied at a time by [`GuestMemory::rewind`].
const REWIND_PIECE: u64 = 16 * 1024;

/// The memory of one guest.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    mapping: Mapping,
    regions: Vec<RamRegion>,
    ram: GuestRam,
}

/// What [`GuestMemory::trim`] has done.
#[derive(Debug)]
pub struct Trimmed {
    /// Bytes of pages that were equal to the image.
    pub equal: u64,
    /// Pages that were folded, if any.
    pub folded: Option<Folded>,
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

    /// Makes a copy-on-write view equal to its `image` again. The pages it has copies of are overwritten with what the
    /// image has there (up to `keep` bytes: they stay private, and so stay mapped writable in the guest's second-stage
    /// tables), or thrown away.
    ///
    /// # Errors
    /// When the page tables or the image cannot be read.
    pub fn rewind(&self, image: &File, keep: u64) -> io::Result<()> {
        let mut buffer = if keep > 0 { vec![0; REWIND_PIECE as usize] } else { Vec::new() };
        let mut kept = 0;
        for range in self.private()? {
            let len = range.end - range.start;
            if kept + len > keep {
                self.mapping.discard(range.start, len)?;
                continue;
            }
            kept += len;
            for start in range.clone().step_by(REWIND_PIECE as usize) {
                let piece = &mut buffer[..(range.end - start).min(REWIND_PIECE) as usize];
                image.read_exact_at(piece, start)?;
                self.write_image(start, piece).map_err(io::Error::other)?;
            }
        }
        Ok(())
    }

    /// Throws away those copies among `pages` (byte ranges, of [`GuestMemory::private`]) that are equal to what the complete `image` has
    /// there: locks that are free again, page tables that were cleared. Those that differ in little are folded, where the host lets
    /// that be: what differs is kept and they are thrown away, too. Nobody touches the memory meanwhile, nor afterwards before
    /// somebody serves the [`Folded`] pages.
    ///
    /// # Errors
    /// When the memory or the image cannot be read. The memory cannot be used any more.
    pub fn trim(&self, pages: &[Range<u64>], image: &File) -> io::Result<Trimmed> {
        let room = (total(pages) / layout::PAGE) as usize;
        let folded = (room > 0).then(|| Folded::new(self.mapping, image, room)).transpose();
        let mut folded = folded.unwrap_or_else(|error| {
            tracing::debug!(error = crate::machine::one_line(&error), "no page is folded");
            None
        });
        let (mut ours, mut theirs) = ([0; layout::PAGE as usize], [0; layout::PAGE as usize]);
        let mut equal = 0;
        for range in pages {
            // One call for neighbours: each ends in the other vCPUs' and the guest's page tables.
            let mut gone = range.start..range.start;
            for start in range.clone().step_by(layout::PAGE as usize) {
                self.read_image(start, &mut ours).map_err(io::Error::other)?;
                image.read_exact_at(&mut theirs, start)?;
                let mut fold =
                    || folded.as_mut()?.folds().push(start / layout::PAGE, &ours, &theirs).then_some(());
                if ours == theirs {
                    equal += layout::PAGE;
                } else if fold().is_none() {
                    self.discard(&gone)?;
                    gone = start + layout::PAGE..start + layout::PAGE;
                    continue;
                }
                gone.end = start + layout::PAGE;
            }
            self.discard(&gone)?;
        }
        // Without a page it may be closed.
        Ok(Trimmed { equal, folded: folded.filter(|folded| !folded.is_empty()) })
    }

    fn discard(&self, range: &Range<u64>) -> io::Result<()> {
        let len = range.end - range.start;
        if len > 0 { self.mapping.discard(range.start, len) } else { Ok(()) }
    }

    /// Makes private copies of these pages (first page of the image and how many) before anybody writes to them. Pages
    /// outside of the memory are ignored, and so is the host's refusal: the guest's own faults come to the same.
    pub fn copy_ahead(&self, runs: &[(u64, u64)]) {
        let _ = self.pieces(runs).try_for_each(|(start, len)| self.mapping.copy(start, len));
    }

    /// Makes a copy-on-write view of the complete `image` a new one: without copies, and without page tables that were inherited. No
    /// userfaultfd is registered for it.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn renew(&self, image: &File) -> io::Result<()> {
        self.mapping.renew(image)
    }

    /// Runs of pages as starts and lengths in bytes, without what is outside of the memory.
    fn pieces(&self, runs: &[(u64, u64)]) -> impl Iterator<Item = (u64, u64)> {
        runs.iter().map(|&(first, pages)| {
            let start = first.saturating_mul(layout::PAGE).min(self.bytes());
            (start, pages.saturating_mul(layout::PAGE).min(self.bytes() - start))
        })
    }

    /// Starts, in bytes, of the parts of the image that are worth [`GuestMemory::enlarge`]: those that are read and not written.
    /// `read` and `written` are runs of pages as in [`GuestMemory::copy_ahead`].
    pub fn worth_enlarging(&self, read: &[(u64, u64)], written: &[&[(u64, u64)]]) -> Vec<u64> {
        large::worth_it(read, written, self.bytes())
    }

    /// Has the 2 MiB of the image from `start` on kept in a large page and mapped so by this process and those that are forked from
    /// it: a guest then takes one fault for 512 pages, and no page tables for them. The image is complete. What the host refuses
    /// stays as it is.
    ///
    /// # Panics
    /// When the part is not inside the memory.
    pub fn enlarge(&self, start: u64) {
        // Linux 6.1 answers EINVAL for private mappings when all is done but the mapping.
        if let Err(error) = self.mapping.collapse(start, LARGE_PAGE) {
            tracing::debug!(start, %error, "not collapsed, or not mapped so");
        }
        // Mapped here, too, it is never a fork's alone (`sys::pagemap`).
        let _ = self.mapping.populate(start, LARGE_PAGE);
    }

    /// Maps these pages of the complete image (runs as in [`GuestMemory::copy_ahead`]), so that processes forked from this one have them
    /// in their page tables from the start and a guest that reads one takes its own fault only. `written` are pages that forks write:
    /// no part with one of them is a large page, which the write that this takes here would take apart. A hint: without such a page
    /// nothing is done, and what the host refuses is left to faults.
    pub fn map_ahead(&self, runs: &[(u64, u64)], written: &[(u64, u64)]) {
        let Some((page, _)) = self.pieces(written).find(|(_, len)| *len > 0) else { return };
        // Neighbours that nobody asked for would be copied into each fork's page tables, too.
        let _exact = Uffd::without_fault_around(&self.mapping);
        let mapped = self.mapping.inherit_page_tables(page);
        let mapped = mapped
            .and_then(|()| self.pieces(runs).try_for_each(|(start, len)| self.mapping.populate(start, len)));
        if let Err(error) = mapped {
            tracing::debug!(%error, "forks inherit no page tables");
        }
    }

    /// Where pages of the image (the first one and how many) are in the guest: addresses and lengths in bytes. What is outside
    /// of the memory is left out.
    pub fn guest_ranges(&self, (first, pages): (u64, u64)) -> impl Iterator<Item = (u64, u64)> {
        let start = first.saturating_mul(layout::PAGE);
        let end = start.saturating_add(pages.saturating_mul(layout::PAGE));
        self.regions.iter().filter_map(move |region| {
            let (from, to) = (start.max(region.offset), end.min(region.offset + region.len));
            (from < to).then(|| (region.gpa + from - region.offset, to - from))
        })
    }

    /// The pages the process has copies of, as byte ranges of the image.
    ///
    /// # Errors
    /// When the page tables cannot be read.
    pub fn private(&self) -> io::Result<Vec<Range<u64>>> {
        self.pages(Pages::Private)
    }

    /// The pages of the image that are in the process's page tables, as byte ranges.
    ///
    /// # Errors
    /// When the page tables cannot be read.
    pub fn shared(&self) -> io::Result<Vec<Range<u64>>> {
        self.pages(Pages::Shared)
    }

    fn pages(&self, wanted: Pages) -> io::Result<Vec<Range<u64>>> {
        let start = self.mapping.address();
        let found = Pagemap::own()?.find(wanted, start, self.bytes())?;
        Ok(found.into_iter().map(|range| range.start - start..range.end - start).collect())
    }

    fn write_image(&self, offset: u64, bytes: &[u8]) -> Result<(), GuestMemoryError> {
        let mut rest = bytes;
        for region in self.regions.iter().filter(|region| offset + bytes.len() as u64 > region.offset) {
            let at = offset + (bytes.len() - rest.len()) as u64;
            let Some(left) = (region.offset + region.len).checked_sub(at) else { continue };
            let (now, later) = rest.split_at(rest.len().min(left as usize));
            self.ram.write_slice(now, GuestAddress(region.gpa + at - region.offset))?;
            rest = later;
        }
        Ok(())
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.mapping.len() as u64
    }
}

#[cfg(test)]
mod tests;
