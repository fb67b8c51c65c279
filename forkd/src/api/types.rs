//! Requests and answers of the API, shared with the command line. Requests refuse unknown fields.

use std::collections::BTreeMap;

use forkling_vmm::protocol::{CpuTemplate, Payload as VmmPayload};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use super::error::{ErrorAnswer, ErrorBody, Kind};
pub use exec::*;
pub use fork::*;
pub use network::*;
pub use pool::*;
pub use ports::*;
pub use residency::*;

mod exec;
mod fork;
mod network;
mod pool;
mod ports;
mod residency;

/// A command: a string for `/bin/sh -c`, or program and arguments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum Command {
    /// For `/bin/sh -c`.
    Shell(String),
    /// Program and arguments.
    Argv(Vec<String>),
}

impl Command {
    /// Program and arguments.
    pub fn argv(&self) -> Vec<String> {
        match self {
            Self::Shell(line) => vec!["/bin/sh".to_owned(), "-c".to_owned(), line.clone()],
            Self::Argv(argv) => argv.clone(),
        }
    }
}

/// When a template's guest is frozen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Ready {
    /// As soon as the warm-up commands are done.
    #[default]
    Immediately,
    /// When the workload asks for it on the forkpoint socket.
    Forkpoint,
    /// When this command exits with 0.
    Command(Command),
    /// When this TCP port accepts on the guest's loopback.
    Port(u16),
}

/// Which CPU features a guest sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum Cpu {
    /// All that this host has and a snapshot can carry.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// x86-64-v2.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// x86-64-v3.
    #[serde(rename = "x86-64-v3")]
    V3,
}

impl From<Cpu> for CpuTemplate {
    fn from(cpu: Cpu) -> Self {
        match cpu {
            Cpu::Host => Self::Host,
            Cpu::V2 => Self::X86_64V2,
            Cpu::V3 => Self::X86_64V3,
        }
    }
}

/// What a template boots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Payload {
    /// A Linux kernel.
    #[default]
    Linux,
    /// A flat binary that is its own agent; for tests and measurements.
    Null,
}

impl From<Payload> for VmmPayload {
    fn from(payload: Payload) -> Self {
        match payload {
            Payload::Linux => Self::Linux,
            Payload::Null => Self::Null,
        }
    }
}

/// A template to build. Paths are absolute, on the daemon's host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BuildTemplate {
    /// Its name.
    #[schema(example = "python")]
    pub name: String,
    /// What it boots.
    #[serde(default)]
    pub payload: Payload,
    /// Kernel (ELF vmlinux or bzImage), or the flat binary of a null payload. The daemon's default if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// The unpacked `lib/modules/VERSION` tree of the kernel. Looked for beside the kernel if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules: Option<String>,
    /// Root file system: path of a directory, a tar or an EROFS image, or `debian`. Without one the guest runs on its
    /// initramfs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "debian")]
    pub root: Option<String>,
    /// Guest memory in MiB, 64 to 65536.
    #[serde(default = "default_memory")]
    pub memory_mib: u32,
    /// Virtual CPUs, 1 to 8.
    #[serde(default = "default_vcpus")]
    pub vcpus: u8,
    /// CPU features the guest sees.
    #[serde(default)]
    pub cpu: Cpu,
    /// Appended to the kernel's command line.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cmdline: String,
    /// Size limit of the writable layer in MiB; half of the memory if 0.
    #[serde(default)]
    pub overlay_mib: u32,
    /// Commands run to completion, in order, before the freeze.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warm_up: Vec<Command>,
    /// Commands started before the freeze and left running.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<Command>,
    /// When the guest is frozen.
    #[serde(default)]
    pub ready: Ready,
    /// Longest wait for that in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_timeout_ms: Option<u64>,
    /// Commands run in every fork before it is handed out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub on_fork: Vec<Command>,
    /// Environment of all commands.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Its network.
    #[serde(default, skip_serializing_if = "is_default")]
    pub network: TemplateNetwork,
}

impl BuildTemplate {
    /// Whether its guests have a NIC.
    pub fn has_nic(&self) -> bool {
        self.payload == Payload::Linux && self.network.nic.unwrap_or(true)
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn default_memory() -> u32 {
    256
}

fn default_vcpus() -> u8 {
    1
}

/// A line of the answer to a template build.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum BuildEvent {
    /// A stage began: `root`, `initramfs`, `boot`, `freeze`, `save`, `load`.
    Stage {
        /// Which.
        stage: String,
    },
    /// Output of the guest's serial console.
    Console {
        /// The bytes as UTF-8, lossy.
        text: String,
    },
    /// How far saving is.
    Save {
        /// Chunks done.
        done: u64,
        /// Chunks in all.
        total: u64,
    },
    /// The template is there.
    Done {
        /// It.
        template: Box<TemplateInfo>,
    },
    /// It could not be built; nothing is left of it.
    Error {
        /// Why.
        error: ErrorBody,
    },
}

/// Whether forks of a template can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum TemplateState {
    /// On disk only; the first fork loads it.
    Cold,
    /// Its zygote is being started.
    Loading,
    /// Its zygote waits for requests.
    Ready,
    /// Its zygote is gone or could not load it.
    Broken,
}

/// Where a template comes from, when it is a snapshot of a fork.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Parent {
    /// Template of that fork.
    pub template: String,
    /// That fork.
    pub fork: String,
}

/// A template.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TemplateInfo {
    /// Its name.
    pub name: String,
    /// Whether forks can be made.
    pub state: TemplateState,
    /// Why it is broken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When it was built: milliseconds since 1970.
    pub created_unix_ms: u64,
    /// The fork it is a snapshot of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Parent>,
    /// Living forks.
    pub forks: u64,
    /// Process id of its zygote.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zygote_pid: Option<i32>,
    /// Bytes of its image in memory; absent when it is cold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resident_bytes: Option<u64>,
    /// How its memory came there; absent when it is cold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub residency: Option<Residency>,
    /// Bytes of its directory on disk, whether or not other templates have the same files.
    pub disk_bytes: u64,
    /// Its parked forks.
    #[serde(default)]
    pub pool: PoolInfo,
    /// Bytes that no other template has; shown when one template is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_unique_bytes: Option<u64>,
    /// What it was built from.
    pub spec: BuildTemplate,
}

/// All templates.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Templates {
    /// By name.
    pub templates: Vec<TemplateInfo>,
}

/// Forks to make.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateForks {
    /// Of which template.
    pub template: String,
    /// How many, 1 to 1000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 1000)]
    pub count: Option<u32>,
    /// A name for each; as many as `count`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
    /// Names each PREFIX-0, PREFIX-1 and so on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name_prefix: Option<String>,
    /// Host name in the guest; its name or id if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Environment of every command, at most 12 KiB.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// A number for the guest.
    #[serde(default)]
    pub param: u64,
    /// Longest time to the acknowledgement in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Whether parked forks may serve.
    #[serde(default)]
    pub pool: PoolUse,
    /// Their network; as the template has it if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<ForkNetworkRequest>,
    /// Kept with each fork and shown with it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

/// How long each phase of a fork took, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Timings {
    /// Request read, until the zygote or the fork's process took it.
    pub queue: f64,
    /// Until the fork's process ran; 0 if it was there.
    pub fork: f64,
    /// Until the KVM VM had its memory.
    pub vm: f64,
    /// Until its vCPUs existed.
    pub vcpus: f64,
    /// Until all state was restored.
    pub restore: f64,
    /// Until the identity was read.
    pub activate: f64,
    /// Until the first KVM_RUN.
    pub enter: f64,
    /// Until the guest had acknowledged.
    pub guest: f64,
    /// Until the daemon knew.
    pub reply: f64,
    /// Sum of all.
    pub total: f64,
}

/// Whether a fork lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ForkState {
    /// Being made.
    Creating,
    /// It acknowledged and runs.
    Running,
    /// Its process is gone.
    Died,
}

/// How a fork ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Death {
    /// For programs: `killed`, `signal`, `exit`, `guest_stopped`, `failed`, `timeout`, `memory`, `shutdown`.
    pub reason: String,
    /// In words.
    pub message: String,
    /// The signal that ended the process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// The process's exit status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// When: milliseconds since 1970.
    pub at_unix_ms: u64,
}

/// A fork.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ForkInfo {
    /// Its id.
    pub id: String,
    /// Its name, if the caller gave one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its template.
    pub template: String,
    /// Whether it lives.
    pub state: ForkState,
    /// How it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub death: Option<Death>,
    /// Host name in the guest.
    pub hostname: String,
    /// Machine id in the guest.
    pub machine_id: String,
    /// Generation of its latest activation.
    pub generation: u64,
    /// Process id on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    /// When it was asked for: milliseconds since 1970.
    pub created_unix_ms: u64,
    /// Whether it came out of the pool.
    #[serde(default)]
    pub parked: bool,
    /// Its place in the network, if it has a NIC and lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<ForkNetwork>,
    /// As given.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// How long its phases took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timings_us: Option<Timings>,
}

/// The answer for one child.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ForkResult {
    /// It runs.
    Fork(Box<ForkInfo>),
    /// It could not be made.
    Error(ErrorBody),
}

/// A list of forks.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Forks {
    /// Newest last.
    pub forks: Vec<ForkInfo>,
}

/// The answer to killing many.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Killed {
    /// Ids of the forks that were killed.
    pub killed: Vec<String>,
}

/// Which template a snapshot becomes.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotFork {
    /// Name of the new template.
    pub name: String,
}

/// The last bytes of a fork's serial console.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ConsoleAnswer {
    /// As UTF-8, lossy.
    pub text: String,
    /// Bytes that were dropped before these.
    pub dropped_bytes: u64,
}

/// Which software answers.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// Of the daemon.
    pub version: String,
    /// Of the API.
    pub api: String,
    /// Process id of the daemon.
    pub pid: i32,
}

/// Whether the daemon works.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// `ok` when everything does, `degraded` when a template is broken.
    pub status: String,
    /// Templates.
    pub templates: u64,
    /// Those that are broken.
    pub broken: Vec<String>,
    /// Living forks.
    pub forks: u64,
    /// Most forks the limits of the daemon's process allow.
    pub max_forks: u64,
    /// Whether images are loaded lazily (userfaultfd works here).
    pub lazy_loading: bool,
}
