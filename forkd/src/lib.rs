//! The Forkling daemon: API, registry, supervision, pager; and the command line that speaks its API.
#![forbid(unsafe_code)]

pub mod pager;
pub mod template;
