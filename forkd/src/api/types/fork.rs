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

/// The answer of a fork's agent to a ping.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
pub struct Pong {
    /// Microseconds from the request to the agent's answer, by the daemon's clock.
    pub micros: f64,
}

/// What a fork is called after a reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum NextIdentity {
    /// As before. Its generation and its randomness are new all the same.
    #[default]
    Same,
    /// The same id and names, another machine id.
    New,
}

/// How to reset a fork.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResetFork {
    /// Its identity from then on.
    #[serde(default)]
    pub identity: NextIdentity,
    /// Keep the memory of pages it wrote, up to 32 MiB, so that writing them again is fast.
    #[serde(default = "super::pool::yes")]
    pub keep_writes: bool,
    /// Longest time to the acknowledgement in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}
