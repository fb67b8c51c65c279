//! Building a template: what goes into its guest, and the steps from a recipe to a snapshot directory.

pub mod initramfs;
pub mod modules;
