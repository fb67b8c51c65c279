//! Topology: one package, one thread a core, APIC ids equal to vCPU numbers.

use super::entries::{CpuidEntries, Leaf};
use super::features;

/// Level types of leaf 0xB.
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Writes the topology of vCPU `index` of `vcpus`.
pub(super) fn apply(entries: &mut CpuidEntries, index: u8, vcpus: u8) {
    let (id, count) = (u32::from(index), u32::from(vcpus));
    // APIC ids are counted in powers of two.
    let ids = count.next_power_of_two();
    let id_bits = ids.trailing_zeros();
    if let Some(leaf) = entries.get_mut(1, 0) {
        leaf.ebx = (id << 24) | (count << 16) | (leaf.ebx & 0xFFFF);
    }
    if vcpus > 1 {
        features::set(entries, "ht");
        if is_amd(entries) {
            // The logical processors of leaf 1 are cores, not threads.
            features::set(entries, "cmp_legacy");
        }
    } else if let Some(leaf) = entries.get_mut(1, 0) {
        leaf.edx &= !(1 << 28);
    }
    caches(entries, ids);
    extended_topology(entries, id, count, id_bits);
    let cores = if is_amd(entries) { (id_bits << 12) | (count - 1) } else { 0 };
    if let Some(leaf) = entries.get_mut(0x8000_0008, 0) {
        leaf.ecx = cores;
    }
    if let Some(leaf) = entries.get_mut(0x8000_001E, 0) {
        (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (id, id, 0, 0);
    }
}

fn is_amd(entries: &CpuidEntries) -> bool {
    entries.get(0, 0).is_some_and(|leaf| matches!(&leaf.ebx.to_le_bytes(), b"Auth" | b"Hygo"))
}

/// Leaves 4 (Intel) and 0x8000001D (AMD): who shares a cache. The first two levels belong to a core.
fn caches(entries: &mut CpuidEntries, ids: u32) {
    for leaf in
        entries.iter_mut().filter(|leaf| matches!(leaf.function, 4 | 0x8000_001D) && leaf.eax & 0x1F != 0)
    {
        let level = (leaf.eax >> 5) & 0x7;
        let sharing = if level < 3 { 0 } else { ids - 1 };
        leaf.eax = (leaf.eax & 0x3FFF) | (sharing << 14);
        if leaf.function == 4 {
            leaf.eax |= (ids - 1) << 26;
        }
    }
}

/// Leaf 0xB: how APIC ids split into thread and core.
fn extended_topology(entries: &mut CpuidEntries, id: u32, count: u32, id_bits: u32) {
    entries.retain(|leaf| leaf.function != 0xB);
    if entries.get(0, 0).is_none_or(|leaf| leaf.eax < 0xB) {
        return;
    }
    for (index, shift, number, kind) in [(0, 0, 1, LEVEL_SMT), (1, id_bits, count, LEVEL_CORE), (2, 0, 0, 0)]
    {
        let leaf =
            Leaf { eax: shift, ebx: number, ecx: (kind << 8) | index, edx: id, ..Leaf::indexed(0xB, index) };
        entries.push(leaf);
    }
}
