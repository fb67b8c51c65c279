//! Answers about single forks.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ForkResult;

/// Where the memory of a fork is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForkMemory {
    /// What the guest has.
    pub guest_bytes: u64,
    /// Of it, pages of the image in the fork's page tables, shared with all forks of the template.
    pub shared_bytes: u64,
    /// Of it, the fork's own copies.
    pub private_bytes: u64,
    /// Private memory of the fork's process that is not the guest's.
    pub vmm_private_bytes: u64,
    /// Page tables of the process; not those that KVM keeps for the guest.
    pub page_table_bytes: u64,
    /// Kernel stacks of the process's threads.
    pub kernel_stack_bytes: u64,
    /// Sum of the three before.
    pub overhead_bytes: u64,
    /// Threads of the process.
    pub threads: u64,
    /// Its open descriptors.
    pub descriptors: u64,
    /// Of them, sockets.
    pub sockets: u64,
}

/// A line of a streamed answer: one child, when it is ready.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ForkEvent {
    /// Its place in the request, from 0.
    pub index: u32,
    /// It, or why there is none.
    #[serde(flatten)]
    pub result: ForkResult,
}
