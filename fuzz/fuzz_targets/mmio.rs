//! Registers, rings and ports of all devices.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| forkling_vmm::devices::fuzzing::mmio(data));
