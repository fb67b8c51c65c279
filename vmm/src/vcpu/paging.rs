//! Translation of a guest-virtual address by the guest's own page tables.
//!
//! KVM_TRANSLATE is of no use here: it asks as the supervisor, whom SMAP forbids the pages of the agent.

use vm_memory::{Bytes, GuestAddress};

use crate::memory::{GuestRam, layout::PAGE};

/// Physical address bits of an entry (AMD64 manual, volume 2, section 5.3.3).
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
/// Levels of 4-level paging: the shift of each level's index, and whether it may end in a page.
const LEVELS: [(u32, bool); 4] = [(39, false), (30, true), (21, true), (12, false)];

/// Guest-physical address of `gva` under the 4-level page tables at `cr3`, or `None` if it is not mapped.
///
/// Everything read is the guest's word; a table outside of RAM ends the walk.
pub fn translate(ram: &GuestRam, cr3: u64, gva: u64) -> Option<u64> {
    let mut table = cr3 & ADDRESS;
    for (shift, may_be_large) in LEVELS {
        let index = (gva >> shift) & 0x1FF;
        let entry: u64 = ram.read_obj(GuestAddress(table + index * 8)).ok()?;
        if entry & PRESENT == 0 {
            return None;
        }
        if may_be_large && entry & LARGE != 0 {
            let offset = (1 << shift) - 1;
            return Some((entry & ADDRESS & !offset) | (gva & offset));
        }
        table = entry & ADDRESS;
    }
    Some(table | (gva & (PAGE - 1)))
}

#[cfg(test)]
mod tests;
