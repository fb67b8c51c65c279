use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use serde::{Deserialize, Serialize};

use crate::snapshot::blob;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sample {
    #[serde(with = "blob")]
    regs: kvm_regs,
    #[serde(with = "blob::list")]
    msrs: Vec<kvm_msr_entry>,
    #[serde(with = "blob::bytes")]
    raw: Vec<u8>,
}

fn sample() -> Sample {
    let regs = kvm_regs { rip: 0x1122_3344_5566_7788, rax: 1, ..Default::default() };
    let msr = |index, data| kvm_msr_entry { index, reserved: 0, data };
    Sample { regs, msrs: vec![msr(0x10, 7), msr(0xC000_0080, u64::MAX)], raw: vec![0, 0xFF, 0x10] }
}

/// Every kernel structure a snapshot holds must stay usable here.
#[test]
fn all_state_structures_have_the_needed_traits() {
    #[derive(Serialize, Deserialize)]
    struct All {
        #[serde(with = "blob")]
        regs: kvm_regs,
        #[serde(with = "blob")]
        sregs: kvm_sregs,
        #[serde(with = "blob")]
        xsave: kvm_xsave,
        #[serde(with = "blob")]
        xcrs: kvm_xcrs,
        #[serde(with = "blob")]
        lapic: kvm_lapic_state,
        #[serde(with = "blob")]
        events: kvm_vcpu_events,
        #[serde(with = "blob")]
        debug: kvm_debugregs,
        #[serde(with = "blob")]
        mp: kvm_mp_state,
        #[serde(with = "blob")]
        irqchip: kvm_irqchip,
        #[serde(with = "blob")]
        clock: kvm_clock_data,
        #[serde(with = "blob::list")]
        cpuid: Vec<kvm_cpuid_entry2>,
    }
    let all = All {
        regs: Default::default(),
        sregs: Default::default(),
        xsave: Default::default(),
        xcrs: Default::default(),
        lapic: Default::default(),
        events: Default::default(),
        debug: Default::default(),
        mp: Default::default(),
        irqchip: Default::default(),
        clock: Default::default(),
        cpuid: vec![Default::default(); 3],
    };
    let text = serde_json::to_string(&all).unwrap();
    let back: All = serde_json::from_str(&text).unwrap();
    assert_eq!(serde_json::to_string(&back).unwrap(), text);
}

#[test]
fn survives_a_round_trip() {
    let text = serde_json::to_string(&sample()).unwrap();
    assert!(text.contains("8877665544332211"), "little-endian rip in {text}");
    let back: Sample = serde_json::from_str(&text).unwrap();
    assert_eq!(back.regs, sample().regs);
    assert_eq!(back.msrs, sample().msrs);
    assert_eq!(back.raw, sample().raw);
    // The same through a reader, where strings are not borrowed.
    let back: Sample = serde_json::from_reader(text.as_bytes()).unwrap();
    assert_eq!(back.raw, sample().raw);
}

#[test]
fn refuses_wrong_lengths_and_digits() {
    let good = serde_json::to_value(sample()).unwrap();
    let refuses = |field: &str, text: &str, reason: &str| {
        let mut value = good.clone();
        value[field] = text.into();
        let error = serde_json::from_value::<Sample>(value).err().expect("must be refused").to_string();
        assert!(error.contains(reason), "{field}: {error}");
    };
    refuses("regs", "00", "structures of 144 bytes");
    refuses("regs", &"00".repeat(145), "structures of 144 bytes");
    refuses("msrs", &"00".repeat(17), "structures of 16 bytes");
    refuses("raw", "0", "not lower-case hex");
    refuses("raw", "0g", "not lower-case hex");
    refuses("raw", "00\u{e9}", "not lower-case hex");
    refuses("raw", "AA", "not lower-case hex");
}

#[test]
fn an_empty_list_is_an_empty_string() {
    let text = serde_json::to_string(&Sample { msrs: vec![], raw: vec![], ..sample() }).unwrap();
    let back: Sample = serde_json::from_str(&text).unwrap();
    assert!(back.msrs.is_empty() && back.raw.is_empty());
}
