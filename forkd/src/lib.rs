//! The Forkling daemon: API, registry, supervision, pager; and the command line that speaks its API.
//!
//! `forkd` parses no guest bytes but RPC frames and reads no guest memory. Each template has a zygote process, each
//! fork is a process of its own and a child of this one; the daemon holds their control sockets and pidfds.
//!
//! Arrows: `limits`, `names` <- `api::{types, error}` <- {`process`, `control`} <- {`zygote`, `agent`} <-
//! {`vsock`, `forward`} <-> `fork` <- `template` <- `engine` <- `api` <- `daemon`; `cli` uses `api::types` only.
#![forbid(unsafe_code)]

pub mod admission;
pub mod agent;
pub mod api;
pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
mod durable;
pub mod engine;
pub mod fork;
pub mod forward;
pub mod identity;
pub mod limits;
pub mod memory;
pub mod names;
pub mod network;
pub mod pager;
pub mod pool;
pub mod process;
pub mod reactor;
pub mod registry;
pub mod spec;
pub mod template;
pub mod vsock;
pub mod zygote;
