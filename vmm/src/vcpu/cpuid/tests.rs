//! CPUID of guests, made from what two kinds of host support.

use super::*;

fn leaves(lines: &str) -> CpuidEntries {
    CpuidEntries::new(lines.lines().map(|line| line.trim().parse().unwrap()).collect())
}

/// KVM in QEMU's software emulation of an AMD processor, as it was, less empty leaves.
fn amd() -> SupportedCpuid {
    let entries = leaves(
        "00000000.0/0 0000000d 68747541 444d4163 69746e65
         00000001.0/0 00060fb1 01020800 f6f83203 0f8bfbfd
         00000006.0/0 00000004 00000000 00000000 00000000
         00000007.0/1 00000000 019803ab 0001020c 20000000
         0000000b.0/1 00000000 00000000 00000000 00000001
         0000000d.0/1 00000207 00000a88 00000a88 00000000
         0000000d.1/1 00000005 00000000 00000000 00000000
         0000000d.2/1 00000100 00000240 00000000 00000000
         0000000d.9/1 00000008 00000a80 00000000 00000000
         40000000.0/0 40000001 4b4d564b 564b4d56 0000004d
         40000001.0/0 01007efb 00000000 00000000 00000000
         80000000.0/0 8000000a 68747541 444d4163 69746e65
         80000001.0/0 00060fb1 00000000 00000077 edd3fbfd
         80000008.0/0 00003928 04000000 00001001 00000000
         8000000a.0/0 00000001 00000008 00000000 10010021",
    );
    SupportedCpuid::granted(entries, true)
}

/// An Intel server: AVX-512, AMX, CET, protection keys, performance counters, five-level paging.
fn intel() -> SupportedCpuid {
    let entries = leaves(
        "00000000.0/0 00000020 756e6547 6c65746e 49656e69
         00000001.0/0 000806f8 00400800 fffaf3ff bfebfbff
         00000004.0/1 0c004121 02c0003f 0000003f 00000000
         00000004.3/1 3c1fc163 0380003f 00017fff 00000004
         00000007.0/1 00000002 f1bf2ffb 1b415fee ffdd4432
         00000007.1/1 04201c30 00000000 00000000 00040000
         00000007.2/1 00000000 00000000 00000000 0000003f
         0000000a.0/0 07300805 00000000 00000000 00008603
         0000000d.0/1 000602e7 00002b00 00002b00 00000000
         0000000d.1/1 0000001f 00002980 00001900 00000000
         0000000d.2/1 00000100 00000240 00000000 00000000
         0000000d.5/1 00000040 00000440 00000000 00000000
         0000000d.6/1 00000200 00000480 00000000 00000000
         0000000d.7/1 00000400 00000680 00000000 00000000
         0000000d.9/1 00000008 00000a80 00000000 00000000
         0000000d.b/1 00000010 00000000 00000001 00000000
         0000000d.11/1 00000040 00000ac0 00000002 00000000
         0000000d.12/1 00002000 00000b00 00000006 00000000
         00000014.0/1 00000000 00000001 00000000 00000000
         0000001d.0/1 00000001 00000000 00000000 00000000
         40000000.0/0 40000001 4b4d564b 564b4d56 0000004d
         40000001.0/0 0100fefb 00000000 00000000 00000001
         80000000.0/0 80000008 00000000 00000000 00000000
         80000001.0/0 00000000 00000000 00000121 2c100800
         80000007.0/0 00000000 00000000 00000000 00000100
         80000008.0/0 00003934 0100d200 00000000 00000000",
    );
    SupportedCpuid::granted(entries, true)
}

const TEMPLATES: [CpuTemplate; 3] = [CpuTemplate::Host, CpuTemplate::X86_64V2, CpuTemplate::X86_64V3];

fn has(entries: &CpuidEntries, feature: &str) -> bool {
    features::has(entries, feature)
}

#[test]
fn guests_get_what_virtualisation_needs_and_nothing_a_snapshot_cannot_carry() {
    for host in [amd(), intel()] {
        for template in TEMPLATES {
            let guest = guest(&host, template, 0, 1);
            for feature in ["hypervisor", "x2apic", "tsc_deadline_timer", "kvm_clocksource2", "nx", "lm"] {
                assert!(has(&guest, feature), "{template:?} lacks {feature}");
            }
            for feature in [
                "vmx",
                "svm",
                "shstk",
                "ibt",
                "xsaves",
                "xfd",
                "amx_tile",
                "la57",
                "invtsc",
                "kvm_asyncpf",
                "kvm_pv_eoi",
            ] {
                assert!(!has(&guest, feature), "{template:?} has {feature}");
            }
            assert!(
                guest.leaves().iter().all(|leaf| !matches!(leaf.function, 0xA | 0x14 | 0x1D | 0x8000_000A))
            );
            assert_eq!(guest.get(0, 0).unwrap().eax, 0xD);
        }
    }
}

#[test]
fn portable_guests_get_their_level_and_nothing_beyond() {
    let v2 = guest(&intel(), CpuTemplate::X86_64V2, 0, 1);
    let v3 = guest(&intel(), CpuTemplate::X86_64V3, 0, 1);
    let host = guest(&intel(), CpuTemplate::Host, 0, 1);
    for feature in ["cx16", "lahf_lm", "popcnt", "sse4_2", "ssse3"] {
        assert!(has(&v2, feature) && has(&v3, feature), "{feature}");
    }
    for feature in ["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"] {
        assert!(!has(&v2, feature) && has(&v3, feature), "{feature}");
    }
    for feature in ["avx512f", "aes", "rdrand", "smap", "erms", "pku", "spec_ctrl", "arch_capabilities"] {
        assert!(!has(&v2, feature) && !has(&v3, feature) && has(&host, feature), "{feature}");
    }
    for portable in [&v2, &v3] {
        assert_eq!(portable.get(0x8000_0008, 0).unwrap().eax, 0x3027);
        assert_eq!(portable.get(0x8000_0000, 0).unwrap().eax, 0x8000_0008);
    }
    assert_eq!(host.get(0x8000_0008, 0).unwrap().eax, 0x3034, "48 linear bits, the host's physical bits");
}

#[test]
fn leaf_d_agrees_with_itself_and_with_the_features() {
    for (host, template, components, size) in [
        (intel(), CpuTemplate::Host, 0x2E7, 0xA88),
        (intel(), CpuTemplate::X86_64V3, 0x7, 0x340),
        // Protection keys are not offered there, so their component is not either.
        (amd(), CpuTemplate::X86_64V3, 0x7, 0x340),
    ] {
        let guest = guest(&host, template, 0, 1);
        let leaf = guest.get(0xD, 0).unwrap();
        assert_eq!((leaf.eax, leaf.ecx, leaf.edx), (components, size, 0), "{template:?}");
        let listed: Vec<u32> =
            guest.leaves().iter().filter(|l| l.function == 0xD && l.index > 1).map(|l| l.index).collect();
        let expected: Vec<u32> = (2..32).filter(|bit| components >> bit & 1 == 1).collect();
        assert_eq!(listed, expected, "{template:?}");
    }
    let none = guest(&intel(), CpuTemplate::X86_64V2, 0, 1);
    assert!(none.leaves().iter().all(|leaf| leaf.function != 0xD));
}

#[test]
fn a_host_without_xsave_has_nothing_that_needs_it() {
    let mut host = amd();
    xsave::remove(&mut host.0);
    let guest = guest(&host, CpuTemplate::Host, 0, 1);
    for feature in ["xsave", "avx", "avx2", "fma", "f16c", "pku", "vaes"] {
        assert!(!has(&guest, feature), "{feature}");
    }
    assert!(has(&guest, "sse4_2"));
    assert!(guest.get(0xD, 0).is_none());
}

#[test]
fn each_vcpu_has_its_own_place_in_the_topology() {
    for host in [amd(), intel()] {
        for vcpus in 1..=8 {
            for index in 0..vcpus {
                let guest = guest(&host, CpuTemplate::Host, index, vcpus);
                let basic = guest.get(1, 0).unwrap();
                assert_eq!((basic.ebx >> 24, basic.ebx >> 16 & 0xFF), (u32::from(index), u32::from(vcpus)));
                assert_eq!(has(&guest, "ht"), vcpus > 1);
                let core = guest.get(0xB, 1).unwrap();
                assert_eq!((core.ebx, core.ecx, core.edx), (u32::from(vcpus), 0x201, u32::from(index)));
                assert!(1 << core.eax >= u32::from(vcpus), "ids fit");
            }
        }
    }
    let third_level = guest(&intel(), CpuTemplate::Host, 0, 3).get(4, 3).copied().unwrap();
    assert_eq!((third_level.eax >> 26, third_level.eax >> 14 & 0xFFF), (3, 3));
    assert!(has(&guest(&amd(), CpuTemplate::Host, 0, 2), "cmp_legacy"));
    assert_eq!(guest(&amd(), CpuTemplate::Host, 0, 3).get(0x8000_0008, 0).unwrap().ecx, 0x2002);
}

#[test]
fn a_guest_fits_the_host_it_was_made_on_and_better_ones() {
    for host in [amd(), intel()] {
        for template in TEMPLATES {
            assert_eq!(compatible(&guest(&host, template, 1, 2), &host), Ok(()));
        }
    }
    // What KVM changes while the guest runs is no requirement.
    let mut running = guest(&amd(), CpuTemplate::X86_64V3, 0, 1);
    features::set(&mut running, "osxsave");
    running.get_mut(0xD, 0).unwrap().ebx = 0x340;
    assert_eq!(compatible(&running, &amd()), Ok(()));
}

#[test]
fn missing_features_are_named() {
    let mut older = intel();
    features::clear(&mut older.0, |name| name == "avx2" || name == "rdrand" || name.starts_with("avx512"));
    let Err(Incompatible::MissingFeatures(missing)) =
        compatible(&guest(&intel(), CpuTemplate::Host, 0, 1), &older)
    else {
        panic!("it does not fit");
    };
    assert!(missing.contains(&"avx2".into()) && missing.contains(&"rdrand".into()), "{missing:?}");
    assert_eq!(compatible(&guest(&intel(), CpuTemplate::X86_64V2, 0, 1), &older), Ok(()));
    let text = compatible(&guest(&intel(), CpuTemplate::X86_64V3, 0, 1), &older).unwrap_err().to_string();
    assert!(text.contains("lacks CPU features of the snapshot: avx2;"), "{text}");
    let mut unknown = guest(&amd(), CpuTemplate::Host, 0, 1);
    unknown.get_mut(7, 0).unwrap().ebx |= 1 << 22;
    let text = compatible(&unknown, &amd()).unwrap_err().to_string();
    assert!(text.contains("CPUID 0x7.0 ebx bit 22"), "{text}");
}

#[test]
fn other_vendors_widths_and_layouts_are_refused() {
    let guest = guest(&intel(), CpuTemplate::Host, 0, 1);
    let error = compatible(&guest, &amd()).unwrap_err();
    assert_eq!(error, Incompatible::Vendor { required: "GenuineIntel".into(), host: "AuthenticAMD".into() });
    let mut narrow = intel();
    narrow.0.get_mut(0x8000_0008, 0).unwrap().eax = 0x3927;
    assert_eq!(compatible(&guest, &narrow), Err(Incompatible::PhysicalBits { required: 52, host: 39 }));
    let mut moved = intel();
    moved.0.get_mut(0xD, 9).unwrap().ebx = 0x980;
    assert_eq!(compatible(&guest, &moved), Err(Incompatible::XsaveLayout { component: 9 }));
}

#[test]
fn leaves_survive_json_and_damage_is_refused() {
    let entries = guest(&intel(), CpuTemplate::Host, 3, 4);
    let json = serde_json::to_string(&entries).unwrap();
    assert_eq!(serde_json::from_str::<CpuidEntries>(&json).unwrap(), entries);
    assert_eq!(CpuidEntries::from(&entries.to_kvm().unwrap()), entries);
    for text in [
        "",
        "1",
        "00000001.0/0 1 2 3",
        "00000001.0/0 1 2 3 4 5",
        "00000001.0/0 1 2 3 +4",
        "00000001.0/0 1 2 3 123456789",
        "00000001.0/0  1 2 3",
        "x.0/0 1 2 3 4",
    ] {
        assert!(text.parse::<Leaf>().is_err(), "{text:?}");
    }
}

#[test]
fn every_name_in_a_policy_exists() {
    for list in features::POLICIES.iter().flat_map(|lists| lists.iter()) {
        for name in list.split_ascii_whitespace() {
            // Panics for an unknown name.
            features::has(&CpuidEntries::default(), name);
        }
    }
}
