//! Packets in the transmit queue of the vsock device, with host streams.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| forkling_vmm::devices::fuzzing::vsock(data));
