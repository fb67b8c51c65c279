//! DNS messages of a guest and of a resolver.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| forkling_net::fuzzing::dns(data));
