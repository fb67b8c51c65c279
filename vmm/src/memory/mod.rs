//! Guest-physical layout, the shared image and a fork's private view of it.

mod fold;
pub mod folded;
pub mod guest;
pub mod image;
mod large;
pub mod layout;

/// Guest memory as devices and loaders see it: checked, volatile access only, never a Rust reference.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;
