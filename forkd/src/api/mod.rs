//! The API.
pub mod error;
pub mod types;
