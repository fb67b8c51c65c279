//! The only unsafe code of the crate: thin safe wrappers over kernel interfaces.
//!
//! Each wrapper upholds its own invariant; where it needs the caller's help, the type system carries it.

pub mod cpu;
pub mod frames;
pub mod kick;
pub mod kvm;
pub mod mapping;
pub mod memfd;
pub mod page_cache;
pub mod pagemap;
pub mod probe;
pub mod process;
pub mod resident;
pub mod tap;
pub mod uffd;
