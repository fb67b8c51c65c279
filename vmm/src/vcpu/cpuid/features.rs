//! Feature bits: their names, and who may see which.
//!
//! Names are those of /proc/cpuinfo where it has one.

use super::entries::{CpuidEntries, Register};
use crate::protocol::CpuTemplate;

/// One register full of feature bits.
#[derive(Clone, Copy, Debug)]
pub struct Word {
    /// Leaf.
    pub function: u32,
    /// Sub-leaf.
    pub index: u32,
    /// Register.
    pub register: Register,
    /// Names from bit 0 on, separated by blanks; `-` for a bit without one.
    names: &'static str,
}

impl Word {
    /// The name of bit `bit`, if it has one.
    pub fn name(&self, bit: u32) -> Option<&'static str> {
        self.names.split_ascii_whitespace().nth(bit as usize).filter(|name| *name != "-")
    }

    /// The bits whose names are in `list`.
    fn mask(&self, list: &[&str]) -> u32 {
        let names = self.names.split_ascii_whitespace().enumerate();
        names.filter(|(_, name)| list.contains(name)).fold(0, |mask, (bit, _)| mask | 1 << bit)
    }

    /// The bits that have names.
    fn known(&self) -> u32 {
        let names = self.names.split_ascii_whitespace().enumerate();
        names.filter(|(_, name)| *name != "-").fold(0, |mask, (bit, _)| mask | 1 << bit)
    }
}

const fn word(function: u32, index: u32, register: Register, names: &'static str) -> Word {
    Word { function, index, register, names }
}

/// All registers of feature bits a guest can see. A bit without a name here is never offered: what the project does
/// not know it does not save.
pub const WORDS: &[Word] = &[
    word(
        1,
        0,
        Register::Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr \
         sse sse2 ss ht tm ia64 pbe",
    ),
    word(
        1,
        0,
        Register::Ecx,
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 \
         sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    ),
    word(6, 0, Register::Eax, "dtherm ida arat"),
    word(
        7,
        0,
        Register::Ebx,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a \
         avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni \
         avx512bw avx512vl",
    ),
    word(
        7,
        0,
        Register::Ecx,
        "- avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme \
         avx512_vpopcntdq - la57 - - - - - rdpid kl bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks",
    ),
    word(
        7,
        0,
        Register::Edx,
        "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear \
         rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 \
         avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities \
         spec_ctrl_ssbd",
    ),
    word(
        7,
        1,
        Register::Eax,
        "sha512 sm3 sm4 - avx_vnni avx512_bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - fred - - - amx_fp16 hreset \
         avx_ifma - - lam",
    ),
    word(7, 1, Register::Edx, "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16"),
    word(7, 2, Register::Edx, "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no"),
    word(
        0xD,
        0,
        Register::Eax,
        "x87_state sse_state avx_state bndregs bndcsr opmask zmm_hi256 hi16_zmm - pkru",
    ),
    word(0xD, 1, Register::Eax, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    word(
        0x4000_0001,
        0,
        Register::Eax,
        "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_asyncpf kvm_steal_time kvm_pv_eoi \
         kvm_pv_unhalt - kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield \
         kvm_asyncpf_int kvm_msi_ext_dest_id kvm_map_gpa_range kvm_migration_control - - - - - - \
         kvm_clocksource_stable",
    ),
    word(
        0x8000_0001,
        0,
        Register::Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - mp nx - mmxext mmx fxsr \
         fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    word(
        0x8000_0001,
        0,
        Register::Ecx,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp \
         fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    word(0x8000_0007, 0, Register::Edx, "- - - - - - - - invtsc"),
    word(
        0x8000_0008,
        0,
        Register::Ebx,
        "clzero irperf xsaveerptr - rdpru - mba - mcommit wbnoinvd - - ibpb int_wbinvd ibrs stibp ibrs_always_on \
         stibp_always_on ibrs_preferred ibrs_same_mode - - - ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no \
         ibpb_ret",
    ),
    word(
        0x8000_0021,
        0,
        Register::Eax,
        "no_nested_data_bp - lfence_rdtsc - - - null_sel_clr_base - auto_ibrs no_smm_ctl_msr - - - - - - - - - - \
         prefetchi - - - - - - sbpb ibpb_brtype srso_no srso_user_kernel_no",
    ),
];

/// Never offered: their state is not in the snapshot, or they would tie the guest to one host or one moment.
const DENIED: &[&str] = &[
    // Nested virtualisation: state of its own.
    "vmx svm skinit",
    // Control-flow enforcement, protection keys for supervisors, and other users of IA32_XSS.
    "shstk ibt xsaves pks arch_lbr uintr",
    // State components that need a permission from the host's kernel or are gone from new processors.
    "amx_bf16 amx_tile amx_int8 amx_fp16 amx_complex xfd mpx bndregs bndcsr",
    // Event delivery and tagging with state that older kernels do not list.
    "fred lam",
    // A fifth level of page tables lengthens each walk, for memory no guest has.
    "la57",
    // Performance counters, tracing, monitoring: left to the host.
    "dtes64 ds_cpl pdcm dts perfctr_core perfctr_nb perfctr_llc ptsc bpext ibs lwp intel_pt cqm rdt_a mba irperf rdpru",
    // Power and temperature.
    "acpi tm pbe est tm2 dtherm ida mwaitx monitor waitpkg hreset cppc hybrid_cpu",
    // Transactions abort on some microcodes and not on others.
    "hle rtm rtm_always_abort tsx_force_abort tsxldtrk",
    // Enclaves, key stores, memory encryption, identity and configuration of the host.
    "sgx sgx_lc sgx_keys kl tme pconfig ppin enqcmd smx dca cid xtpr pn ia64 sdbg core_capabilities bus_lock_detect",
    "extapic wdt nodeid_msr mcommit int_wbinvd virt_ssbd",
    // KVM: a page that is waited for asynchronously hung restored guests; nothing here pauses for a migration.
    "kvm_asyncpf kvm_asyncpf_vmexit kvm_asyncpf_int kvm_migration_control kvm_map_gpa_range kvm_mmu_op",
    // The end of an interrupt without an exit. Interrupt controllers in hardware do not need it, and in the lab it is
    // fatal: QEMU may deliver an injected interrupt a second time until the guest's next exit, and this would put that
    // exit after the handler instead of before it.
    "kvm_pv_eoi",
    // With it the guest's clock is the raw TSC, which stands still while a fork is parked; without, it is kvmclock,
    // which the host sets at activation.
    "invtsc",
];

/// Every x86-64 processor has these; the kernel needs them.
const BASELINE: &str = "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse \
                        sse2 ht syscall nx lm cmp_legacy";

/// What a guest of KVM runs well with, from KVM itself and not from the processor.
const VIRTUAL: &str = "x2apic tsc_deadline_timer hypervisor arat kvm_clocksource kvm_nop_io_delay kvm_clocksource2 \
                       kvm_steal_time kvm_pv_unhalt kvm_pv_tlb_flush kvm_pv_send_ipi kvm_poll_control \
                       kvm_pv_sched_yield kvm_msi_ext_dest_id kvm_clocksource_stable";

/// System V psABI for x86-64, "Micro-architecture levels": what v2 adds.
const V2: &str = "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3";

/// What v3 adds, with the state components its features need.
const V3: &str = "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave osxsave x87_state sse_state avx_state";

/// Bits that follow the guest's own state or topology; they say nothing about the host.
pub(super) const DYNAMIC: &[&str] = &["osxsave", "ospke", "ht", "cmp_legacy", "apic"];

/// All lists of names, for the test that each name exists.
#[cfg(test)]
pub(super) const POLICIES: [&[&str]; 3] = [DENIED, &[BASELINE, VIRTUAL, V2, V3], DYNAMIC];

/// Leaves each word's bits that `template` allows.
pub(super) fn apply(entries: &mut CpuidEntries, template: CpuTemplate) {
    let names =
        |list: &[&'static str]| list.iter().flat_map(|l| l.split_ascii_whitespace()).collect::<Vec<_>>();
    let allowed = match template {
        CpuTemplate::Host => None,
        CpuTemplate::X86_64V2 => Some(names(&[BASELINE, VIRTUAL, V2])),
        CpuTemplate::X86_64V3 => Some(names(&[BASELINE, VIRTUAL, V2, V3])),
    };
    let denied = names(DENIED);
    for leaf in entries.iter_mut().filter(|leaf| WORDS.iter().any(|w| w.function == leaf.function)) {
        for register in [Register::Eax, Register::Ebx, Register::Ecx, Register::Edx] {
            let at = (leaf.function, leaf.index, register);
            if let Some(word) = WORDS.iter().find(|w| (w.function, w.index, w.register) == at) {
                let allowed =
                    allowed.as_ref().map_or(!word.mask(&denied) & word.known(), |list| word.mask(list));
                *leaf.register_mut(register) &= allowed;
            } else if !is_number(at) {
                *leaf.register_mut(register) = 0;
            }
        }
    }
    limit_subleaves(entries, template);
}

/// Whether a register of a leaf with feature bits holds numbers, which are no features.
fn is_number((function, index, register): (u32, u32, Register)) -> bool {
    matches!(
        (function, index, register),
        // Family and model; sizes and APIC id.
        (1, 0, Register::Eax | Register::Ebx)
            // Number of sub-leaves.
            | (7, 0, Register::Eax)
            // Sizes of the state components, made consistent later.
            | (0xD, _, _)
            // AMD: family and model, brand.
            | (0x8000_0001, 0, Register::Eax | Register::Ebx)
            // Address widths, number of cores.
            | (0x8000_0008, 0, Register::Eax | Register::Ecx)
    )
}

/// Leaf 7 says how many sub-leaves it has.
fn limit_subleaves(entries: &mut CpuidEntries, template: CpuTemplate) {
    let last = match template {
        CpuTemplate::Host => 2,
        CpuTemplate::X86_64V2 | CpuTemplate::X86_64V3 => 0,
    };
    if let Some(leaf) = entries.get_mut(7, 0) {
        leaf.eax = leaf.eax.min(last);
    }
    entries.retain(|leaf| leaf.function != 7 || leaf.index <= last);
}

/// The first word that has a feature, and its bit.
fn find(feature: &str) -> (Word, u32) {
    let found =
        WORDS.iter().find_map(|w| Some((*w, w.names.split_ascii_whitespace().position(|n| n == feature)?)));
    let (word, bit) = found.unwrap_or_else(|| panic!("no CPU feature is named {feature}"));
    (word, bit as u32)
}

/// Whether a feature is there, by its name.
pub(super) fn has(entries: &CpuidEntries, feature: &str) -> bool {
    let (word, bit) = find(feature);
    entries.get(word.function, word.index).is_some_and(|leaf| leaf.register(word.register) & 1 << bit != 0)
}

/// Clears the features whose names `unwanted` picks.
pub(super) fn clear(entries: &mut CpuidEntries, unwanted: impl Fn(&str) -> bool) {
    for word in WORDS {
        let Some(leaf) = entries.get_mut(word.function, word.index) else { continue };
        let names = word.names.split_ascii_whitespace().enumerate();
        let mask = names.filter(|(_, name)| unwanted(name)).fold(0, |mask, (bit, _)| mask | 1_u32 << bit);
        *leaf.register_mut(word.register) &= !mask;
    }
}

/// Sets a feature, by its name, if its leaf is there.
pub(super) fn set(entries: &mut CpuidEntries, feature: &str) {
    let (word, bit) = find(feature);
    if let Some(leaf) = entries.get_mut(word.function, word.index) {
        *leaf.register_mut(word.register) |= 1 << bit;
    }
}
