//! One virtual CPU.

pub mod cpuid;
