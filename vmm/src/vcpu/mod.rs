//! One virtual CPU.
