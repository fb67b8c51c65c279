//! From a kernel file to a machine ready for its first instruction.

pub mod null;
