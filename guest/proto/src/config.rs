//! What the host tells the agent once, in the initramfs of a template: how to bring the guest to its forkpoint.

use alloc::{string::String, vec::Vec};
use serde::{Deserialize, Serialize};

/// Path of the postcard-encoded [`GuestConfig`] in the initramfs.
pub const PATH: &str = "/forkling.config";

/// Directory of kernel modules in the initramfs; they are loaded in the order of [`GuestConfig::modules`].
pub const MODULES_DIR: &str = "/modules";

/// How a template's guest is brought up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestConfig {
    /// File names in [`MODULES_DIR`], in load order (dependencies first).
    pub modules: Vec<String>,
    /// Where the root file system is.
    pub root: Root,
    /// Size limit of the writable overlay in MiB; 0 for half of the memory.
    pub overlay_mib: u32,
    /// Commands (argv) run to completion, in order, before the ready condition; a failure fails the template.
    pub warm_up: Vec<Vec<String>>,
    /// Commands (argv) started before the ready condition and left running (daemons, warm interpreters).
    pub services: Vec<Vec<String>>,
    /// When the guest may be frozen.
    pub ready: Ready,
    /// Longest wait for the ready condition in milliseconds.
    pub ready_timeout_ms: u64,
    /// Commands (argv) run in every fork after identity is applied and before it acknowledges.
    pub on_fork: Vec<Vec<String>>,
    /// Whether there is a NIC to bring up.
    pub network: bool,
    /// Environment of all commands.
    pub env: Vec<(String, String)>,
}

/// The root file system the guest runs on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Root {
    /// EROFS on `/dev/pmem0`, mounted with DAX, under an overlay in RAM.
    #[default]
    Pmem,
    /// The initramfs itself; for guests without a root image.
    Initramfs,
}

/// The condition under which the guest is frozen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ready {
    /// As soon as the warm-up commands are done.
    #[default]
    Immediately,
    /// When this command (argv), retried every 20 ms, exits with 0.
    Command(Vec<String>),
    /// When a TCP port on the guest's loopback accepts.
    Port(u16),
    /// When the workload connects to the agent's Unix socket [`FORKPOINT_SOCKET`] for the first time.
    Forkpoint,
}

/// Unix stream socket in the guest on which the workload asks for a forkpoint: it connects, and reads one line,
/// `generation <n>\n`, in every fork after identity is applied and before the fork acknowledges. Then the connection is
/// closed; a program that wants to be told of the next fork too connects again.
pub const FORKPOINT_SOCKET: &str = "/run/forkling/forkpoint.sock";

/// File in the guest that holds the current generation: decimal, padded with spaces to 20 characters, and a newline.
/// It changes in place at each fork.
pub const GENERATION_FILE: &str = "/run/forkling/generation";
