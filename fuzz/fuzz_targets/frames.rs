//! Frames of three guests to the net process.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| forkling_net::fuzzing::frames(data));
