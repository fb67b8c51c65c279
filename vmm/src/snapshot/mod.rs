//! A snapshot on disk: manifest, state and memory chunks.

pub mod blob;
