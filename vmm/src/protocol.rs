//! Messages between `forkd` and the processes of this crate.
//!
//! Each process has one control socket (`SOCK_SEQPACKET`, inherited as [`CONTROL_FD`] by builders and zygotes, handed
//! over by the zygote's [`ToZygote::Spawn`] to forks). A message is one packet of postcard, at most [`MAX_MESSAGE`]
//! bytes, with the file descriptors its variant names, in that order, as ancillary data.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// File descriptor number of the control socket in a builder or zygote process: standard input, because that is
/// the one number a parent without `unsafe` can choose.
pub const CONTROL_FD: i32 = 0;

/// Longest message in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// To the zygote of a template.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToZygote {
    /// First message. Descriptors: `state.json` of the snapshot, the image memfd, then, if `root`, the root image; all of them
    /// read-only.
    Load {
        /// `manifest.json` of the snapshot, verified.
        manifest: Vec<u8>,
        /// Whether a root image descriptor follows.
        root: bool,
        /// How long a fork's devices have had nothing to do when it gives back the pages that are equal to the image again, or
        /// nearly so, in milliseconds; none: never. Guests with several vCPUs never do.
        trim_after_ms: Option<u32>,
    },
    /// What forks touch first, so that later ones get copies of it, or have it mapped, in one go instead of by a fault for
    /// each page. Each replaces the one before; one with [`FirstPages::read`] is sent when the image is complete. No answer.
    FirstPages(FirstPages),
    /// Make an embryo, when nothing else has been asked for a while: the process of a fork to come, which waits for [`ToFork::Begin`].
    /// The image is complete. Descriptor: the fork's end of its control socket. Answered as [`ToZygote::Spawn`]; sent again
    /// after the answer only.
    Embryo {
        /// As in [`ToZygote::Spawn`].
        token: u64,
    },
    /// Make a fork. Descriptors: the fork's end of its control socket, then, if the template has a NIC, that of its
    /// frame socket, non-blocking. Answered by
    /// [`FromZygote::Spawned`] or [`FromZygote::SpawnFailed`]; later news come on the fork's own socket.
    Spawn {
        /// Chosen by `forkd`, repeated in the answer.
        token: u64,
        /// What it sees of the image.
        view: View,
        /// Whether the pages that forks read first ([`FirstPages::read`]) are mapped for its guest ahead, where the host can.
        pre_fault: bool,
    },
}

/// How a fork sees its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum View {
    /// All of it is there.
    Complete,
    /// All of it is there, and nothing that could be had later is held before the activation: no copies, no page tables.
    Bare,
    /// Pages may be missing: the fork registers a userfaultfd for them ([`FromFork::Faults`]).
    Lazy,
    /// All of it is there, and only pages that are really touched enter the fork's page tables, at the price of a fault
    /// for each: for learning what is touched. Such a fork tells it ([`FromFork::WorkingSet`]) at its acknowledgement too.
    Exact,
}

/// From the zygote.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromZygote {
    /// The snapshot is decoded and fits this host; forks can be made.
    Loaded,
    /// The snapshot cannot be forked here; the zygote ends.
    LoadFailed(Failure),
    /// The fork's process exists. It is a child of `forkd` (CLONE_PARENT), which reaps it.
    Spawned {
        /// As in [`ToZygote::Spawn`].
        token: u64,
        /// Process id of the fork, or of the embryo.
        pid: i32,
    },
    /// The fork's process could not be made.
    SpawnFailed {
        /// As in [`ToZygote::Spawn`].
        token: u64,
        /// Why.
        failure: Failure,
    },
}

/// To a fork.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToFork {
    /// First message to an embryo, and to nobody else: be a fork, with a VM. Descriptor, if the template has a NIC: its frame socket,
    /// non-blocking. Answered as by any fork, by [`FromFork::Parked`].
    Begin,
    /// Give identity and run. Answered by [`FromFork::Acknowledged`]. Sent to a parked fork, or one that is to park.
    Activate {
        /// Encoded mailbox ([`forkling_proto::mailbox::encode`]); the fork writes it as it is.
        mailbox: Vec<u8>,
        /// The guest's monotonic clock continues from its freeze (false) or is moved by the time passed (true).
        advance_monotonic: bool,
        /// Whether its NIC, if it has one, is plugged in.
        plugged: bool,
    },
    /// Let the guest prepare for its activation: it runs with this mailbox ([`forkling_proto::mailbox::Header::prepare`]) to
    /// its next forkpoint. Sent to a parked fork, once. Answered by [`FromFork::Parked`].
    Prepare {
        /// As for [`ToFork::Activate`].
        mailbox: Vec<u8>,
    },
    /// Join a host stream (descriptor: a connected stream socket) with the guest's vsock port.
    /// On refusal by the guest the stream is closed. Sent to a parked fork, it is open when the guest runs.
    Connect {
        /// Guest port.
        port: u32,
        /// How the stream begins.
        opening: Opening,
    },
    /// From now on, until a rewind, the guest may ask for host ports ([`FromFork::Dial`]). Before, it is refused.
    OfferPorts,
    /// Answer to [`FromFork::Dial`]. Descriptor: a connected stream socket; without one the guest is refused.
    Dialled {
        /// As in the question. One that nobody waits for any more is no error.
        token: u64,
    },
    /// End all forwarded streams of a group.
    Cut {
        /// As in [`Opening::Forwarded`].
        group: u32,
    },
    /// Go back to the template's forkpoint: every byte of the guest's memory and all its state are the template's again,
    /// connections are closed. Answered by [`FromFork::Parked`], before which nothing else is to be sent.
    Rewind {
        /// Keep the pages the guest wrote as private copies: faster for what runs next, at the price of their memory.
        keep_writes: bool,
    },
    /// Tell what the guest has touched since the fork was made, while it goes on. Answered by [`FromFork::WorkingSet`].
    Report,
    /// Save the machine when the guest reaches its next forkpoint (the caller makes the agent go there).
    /// Descriptor: an empty snapshot directory (writable). Answered by [`FromFork::Saved`]; the guest then goes on
    /// with the mailbox given here.
    Save {
        /// Mailbox with which the saved machine itself goes on.
        mailbox: Vec<u8>,
    },
}

/// From a fork.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromFork {
    /// Sent first when the image is incomplete. Descriptor: a userfaultfd on the guest memory's private mapping.
    Faults {
        /// Host-virtual start of the mapping in the fork's address space, in bytes.
        base: u64,
        /// Length of the mapping in bytes; offset 0 is offset 0 of the image.
        len: u64,
    },
    /// Restored, or rewound, and waiting for [`ToFork::Activate`].
    Parked(Stamps),
    /// What the guest touched since the fork was made, as far as page tables tell (the kernel maps the neighbours of a page
    /// that is read). From a fork that sees [`View::Exact`] directly before [`FromFork::Acknowledged`], from any when asked
    /// ([`ToFork::Report`]).
    WorkingSet {
        /// Pages read and not written: first page of the image and how many.
        read: Vec<PageRun>,
        /// Pages written.
        write: Vec<PageRun>,
    },
    /// The guest acknowledged its identity.
    Acknowledged {
        /// From the acknowledgement, equal to the mailbox's.
        generation: u64,
        /// From the acknowledgement, equal to the mailbox's.
        nonce: u64,
        /// When each phase was reached.
        stamps: Stamps,
    },
    /// The snapshot asked for by [`ToFork::Save`] is on disk.
    Saved,
    /// The guest wants a connection to a port of the host. Answered by [`ToFork::Dialled`]; the guest waits meanwhile.
    Dial {
        /// Never used twice by a fork.
        token: u64,
        /// Host port.
        port: u32,
    },
    /// What became of a stream that was forwarded ([`Opening::Forwarded`]).
    Forwarded {
        /// As in the opening.
        group: u32,
        /// What.
        passage: Passage,
    },
    /// Something failed; fatal unless it answers [`ToFork::Save`].
    Failed(Failure),
    /// The guest ended by itself; the process exits next.
    Stopped(StopReason),
    /// New bytes of the serial console (at most 4 KiB a message, rate limited; the ring keeps the last 64 KiB).
    Console(Vec<u8>),
}

/// How a host stream into a guest begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Opening {
    /// With its own bytes.
    Plain,
    /// The host reads `OK <host port>\n` as soon as the guest has accepted, before any byte of the guest.
    Announced,
    /// With a header and the guest's verdict on it.
    Forwarded {
        /// Whose it is; repeated in [`FromFork::Forwarded`].
        group: u32,
        /// Bytes for the guest ahead of the host's.
        first: Vec<u8>,
    },
}

/// A step in the life of a forwarded stream. Each stream is either refused, or accepted and later ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Passage {
    /// The guest's first byte was 0; it is not passed on.
    Accepted,
    /// The guest's first byte was another, or the stream ended before it.
    Refused,
    /// An accepted stream has ended.
    Ended,
}

/// Pages that the forks of a template touch first, in lists of at most [`MAX_PAGE_RUNS`] runs. A hint: pages outside of the
/// image are ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirstPages {
    /// Written until the acknowledgement.
    pub acknowledge: Vec<PageRun>,
    /// Written from there to the end of the first command.
    pub command: Vec<PageRun>,
    /// Read until then, and not written.
    pub read: Vec<PageRun>,
}

/// Neighbouring pages of 4 KiB of an image: number of the first, and how many.
pub type PageRun = (u64, u64);

/// Most runs in one list of a [`FromFork::WorkingSet`]; what exceeds it is left out, it is a hint.
pub const MAX_PAGE_RUNS: usize = 4096;

/// To the builder of a template.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToBuilder {
    /// First and only message. Descriptors: the kernel file, the initramfs file, the empty snapshot directory
    /// (writable), then, if `root`, the root image (read-only), then, if `network`, the NIC's frame socket,
    /// non-blocking.
    Build(BuildSpec),
}

/// What a builder boots and saves.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BuildSpec {
    /// Guest memory in MiB, 64 to 65536.
    pub memory_mib: u32,
    /// 1 to 8.
    pub vcpus: u8,
    /// Which CPU features the guest may see.
    pub cpu: CpuTemplate,
    /// Appended to the built-in kernel command line.
    pub cmdline: String,
    /// Whether a root image descriptor follows.
    pub root: bool,
    /// Whether it has a NIC.
    pub network: bool,
    /// What boots.
    pub payload: Payload,
    /// Longest time from first instruction to forkpoint in milliseconds.
    pub timeout_ms: u64,
    /// zstd level of the chunks, 1 to 19.
    pub compression: i32,
}

/// What a template boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Payload {
    /// A Linux kernel (ELF or bzImage).
    Linux,
    /// The null guest: the kernel file is a flat binary, loaded at its fixed address and entered in user mode.
    Null,
}

/// Which CPU features a guest sees, so that its snapshot runs on other hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CpuTemplate {
    /// All that this host's KVM supports (less what snapshots cannot carry).
    #[default]
    Host,
    /// x86-64-v2 of the System V psABI and nothing beyond.
    X86_64V2,
    /// x86-64-v3 of the System V psABI and nothing beyond.
    X86_64V3,
}

/// From the builder.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromBuilder {
    /// A stage began: `boot`, `freeze`, `save`.
    Stage(String),
    /// Bytes of the guest's serial console.
    Console(Vec<u8>),
    /// Chunks written so far, of how many.
    Saving {
        /// Chunks done.
        done: u64,
        /// Chunks in the image.
        total: u64,
    },
    /// The snapshot is complete in the directory; the builder exits with 0.
    Done,
    /// The build failed; the builder exits with 1.
    Failed(Failure),
}

/// A failure as it crosses a process boundary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Whose fault it is.
    pub kind: FailureKind,
    /// What happened, to what, and its causes, in one line.
    pub message: String,
}

/// Whose fault a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The caller asked for something impossible (not a kernel, memory out of range).
    Request,
    /// The snapshot is damaged, of another format, or does not fit this host.
    Snapshot,
    /// The guest misbehaved or gave up.
    Guest,
    /// This host could not do it (KVM, memory, limits).
    Host,
}

/// Why a guest ended by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopReason {
    /// The guest asked for a reset or power-off.
    Reset,
    /// A triple fault.
    TripleFault,
    /// The agent gave up with this message.
    AgentFailed(String),
    /// KVM could not go on.
    KvmError(String),
}

/// When each phase of a fork was reached: CLOCK_MONOTONIC nanoseconds of the host; 0 where it was not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamps {
    /// The zygote took the request, or the embryo did.
    pub requested: u64,
    /// The fork's process runs; an embryo's did before.
    pub forked: u64,
    /// The KVM VM has its memory.
    pub vm: u64,
    /// Its vCPUs exist.
    pub vcpus: u64,
    /// All state is restored; the fork is parked.
    pub restored: u64,
    /// The activation was received.
    pub activated: u64,
    /// The first KVM_RUN began.
    pub entered: u64,
    /// The guest acknowledged.
    pub acknowledged: u64,
}

/// Why a packet is not a message.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bytes are not the expected message.
    #[error("malformed control message of {0} bytes; both sides must be of one build")]
    Malformed(usize),
    /// The message is too long to send.
    #[error("control message of {0} bytes exceeds {MAX_MESSAGE}; shorten the environment")]
    TooLong(usize),
}

/// Encodes a message.
pub fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, Error> {
    let bytes = postcard::to_allocvec(message).map_err(|_| Error::Malformed(0))?;
    if bytes.len() > MAX_MESSAGE { Err(Error::TooLong(bytes.len())) } else { Ok(bytes) }
}

/// Decodes a message.
pub fn decode<M: DeserializeOwned>(bytes: &[u8]) -> Result<M, Error> {
    postcard::from_bytes(bytes).map_err(|_| Error::Malformed(bytes.len()))
}
