//! The promises that need a Linux guest: a stock Debian kernel and root. Not part of `cargo test` of the workspace,
//! because few development machines can run them natively; `tests/run` runs them there or in the lab.
//!
//! One template for each number of vCPUs is built once, into `$FORKLING_TEST_STATE`, and shared. Every test has a daemon
//! of its own over it, so each loads the template anew, as after a restart.

mod exec;
mod guest;
mod identity;
mod isolation;
mod memory;
mod network;
mod pager;
mod pool;
mod ports;
mod second_generation;
mod tap;
mod time;
mod two_vcpus;
mod unprivileged;
mod vsock;
