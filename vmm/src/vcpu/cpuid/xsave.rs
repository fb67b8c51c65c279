//! Leaf 0xD: the state components the guest may enable, and the sizes of its save area.
//!
//! KVM reports what the host's processor has, which need not agree with the features a guest is left with; a guest
//! kernel that computes another size than it reads from CPUID warns and may turn XSAVE off. So the leaf is made anew:
//! a component is there exactly if its feature is.

use super::{
    entries::{CpuidEntries, Register},
    features,
};

const LEAF: u32 = 0xD;

/// Legacy region and XSAVE header in bytes; components 0 and 1 lie in it.
const BASE_SIZE: u32 = 576;

/// Components beyond 0 (x87) and 1 (SSE), and the feature each belongs to.
const COMPONENTS: [(u32, &str); 5] = [(2, "avx"), (5, "avx512f"), (6, "avx512f"), (7, "avx512f"), (9, "pku")];

/// Instructions with a VEX or EVEX prefix, and other users of the save area, that are not named after AVX.
const DEPENDENT: &[&str] =
    &["xsave", "osxsave", "f16c", "fma", "fma4", "xop", "vaes", "vpclmulqdq", "pku", "ospke"];

/// Takes away XSAVE and all that needs it.
pub(super) fn remove(entries: &mut CpuidEntries) {
    features::clear(entries, |name| name.starts_with("avx") || DEPENDENT.contains(&name));
    entries.retain(|leaf| leaf.function != LEAF);
}

/// Makes leaf 0xD consistent with the features that are left.
pub(super) fn apply(entries: &mut CpuidEntries) {
    if !features::has(entries, "xsave") {
        remove(entries);
        return;
    }
    let mut components = 0b11;
    let mut size = BASE_SIZE;
    for (component, feature) in COMPONENTS {
        // Size in EAX, offset in EBX.
        let Some(leaf) = entries.get(LEAF, component).filter(|leaf| leaf.eax != 0) else { continue };
        if features::has(entries, feature) {
            components |= 1 << component;
            size = size.max(leaf.eax.saturating_add(leaf.ebx));
        }
    }
    entries.retain(|leaf| {
        leaf.function != LEAF || leaf.index < 2 || leaf.index < 32 && components >> leaf.index & 1 == 1
    });
    if let Some(leaf) = entries.get_mut(LEAF, 0) {
        // EBX is the size for the components enabled now; KVM keeps it up to date.
        (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (components, BASE_SIZE, size, 0);
    }
    if let Some(leaf) = entries.get_mut(LEAF, 1) {
        // No supervisor components; EBX, the size of the compacted area, is KVM's to keep.
        (*leaf.register_mut(Register::Ebx), leaf.ecx, leaf.edx) = (0, 0, 0);
    }
}
