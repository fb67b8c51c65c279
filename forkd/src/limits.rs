//! Every bound of the daemon, each with its reason.

use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Most forks one request may ask for: the largest fan-out that is measured and tested.
pub const MAX_COUNT: u32 = 1000;

/// Most TAP devices when nothing is set: as many forks as are measured and tested, and those that wait in a pool.
pub const MAX_TAPS: u32 = 2 * MAX_COUNT;

/// Children that may wait for their construction when nothing is set: four of the largest requests, some seconds.
pub const MAX_QUEUE: u64 = 4 * MAX_COUNT as u64;

/// Longest name in bytes: a host name label, and a file name with room for suffixes.
pub const MAX_NAME: usize = 63;

/// Longest request body in bytes, but for those below: no request but exec carries data.
pub const MAX_BODY: usize = 1 << 20;

/// Longest body of an exec request in bytes: its standard input rides in it, base64 adds a third.
pub const MAX_EXEC_BODY: usize = 16 << 20;

/// Longest line of a streamed exec request in bytes: one frame of input in base64 with its JSON.
pub const MAX_EXEC_LINE: usize = 1 << 20;

/// Bytes kept of each output stream of an exec that is answered at once; a guest can write for ever.
pub const MAX_OUTPUT: usize = 10 << 20;

/// Longest standard input in bytes that may travel on the shared agent connection; beyond it a command that does not
/// read would hold up its neighbours, so it gets a connection of its own. The capacity of a pipe.
pub const MAX_SHARED_STDIN: usize = 64 << 10;

/// Bytes of a fork's environment, names and values: it travels in a 16 KiB mailbox beside the rest of the identity.
pub const MAX_ENV: usize = 12 << 10;

/// Bytes of metadata, keys and values: it is kept for every fork and echoed in every list.
pub const MAX_METADATA: usize = 8 << 10;

/// Longest kernel command line part in bytes; the kernel takes 2048 in all on x86.
pub const MAX_CMDLINE: usize = 1024;

/// Most commands of a kind in a template, and most words in a command: they travel in the initramfs.
pub const MAX_COMMANDS: usize = 256;

/// Template builds at once: each boots a guest and compresses its memory with a core of its own.
pub const CONCURRENT_BUILDS: usize = 2;

/// Records of dead forks kept for questions about their end.
pub const MAX_DEAD: usize = 1024;

/// How long they are kept.
pub const DEAD_TTL: Duration = Duration::from_secs(600);

/// Answers kept for replays by idempotency key.
pub const MAX_IDEMPOTENT: usize = 4096;

/// How long they are kept.
pub const IDEMPOTENT_TTL: Duration = Duration::from_secs(600);

/// Longest idempotency key in bytes.
pub const MAX_IDEMPOTENCY_KEY: usize = 128;

/// Last bytes of a guest's serial console that are kept.
pub const CONSOLE_RING: usize = 64 << 10;

/// How long a fork may take from request to acknowledgement when the caller sets nothing.
pub const DEFAULT_CREATE_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest timeout a caller may set: a day, so that nothing overflows and nothing is held for ever.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// How long a template's guest may take to its ready condition when the spec sets nothing.
pub const DEFAULT_READY_TIMEOUT: Duration = Duration::from_secs(300);

/// Time of a boot beside the ready condition; an emulated host is slow.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(300);

/// Longest run of one tool that makes a root image.
pub const TOOL_TIMEOUT: Duration = Duration::from_secs(1800);

/// How long a zygote may take to read a snapshot's state.
pub const LOAD_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a fork may take to be parked, its rehearsal included; an emulated host is slow.
pub const PARK_TIMEOUT: Duration = Duration::from_secs(60);

/// Most forwarded ports of a fork: each is a listener of the daemon.
pub const MAX_PORTS: usize = 64;

/// Clients of a fork's vsock socket that may be about to say what they want.
pub const MAX_GREETINGS: usize = 64;

/// How long they may take to say it.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// How long somebody who listens for a guest may take to be connected to.
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a fork's agent may take to connect to a port of its guest; an emulated host is slow.
pub const TUNNEL_TIMEOUT: Duration = Duration::from_secs(30);

/// Most forks a pool may hold.
pub const MAX_POOL: u32 = 4096;

/// How often a pool looks after itself when nothing happens.
pub const POOL_TICK: Duration = Duration::from_secs(1);

/// How long a refill waits after a fork was taken, unless forks are taken fast: longer than the way to its first answer.
pub const POOL_PAUSE: Duration = Duration::from_millis(20);

/// How long after its last request a pool shrinks to its low watermark.
pub const POOL_IDLE: Duration = Duration::from_secs(60);

/// Pause after a fork that could not be parked, doubled with each in a row.
pub const POOL_PATIENCE: Duration = Duration::from_millis(100);

/// How long a fork waits for a chunk of its memory before it is killed: a disk that takes longer is dead.
pub const PAGE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a process that closed its control socket may take to exit before it is killed.
pub const EXIT_GRACE: Duration = Duration::from_secs(2);

/// How long the daemon waits for its children when it ends.
pub const SHUTDOWN_GRACE: Duration = Duration::from_secs(10);

/// Time the agent has beyond a command's own timeout before it counts as unresponsive.
pub const AGENT_GRACE: Duration = Duration::from_secs(10);

/// How long an agent may take to start a command. A healthy one takes milliseconds, in an emulated host seconds; a
/// guest that hangs takes for ever.
pub const START_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a snapshot of a running fork may take.
pub const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(300);

/// Memory in MiB that must stay available on the host beside a guest that is built.
pub const HOST_RESERVE_MIB: u64 = 64;

/// Descriptors of the daemon for one fork: control socket, pidfd, userfaultfd, agent connection, frame socket, two in
/// passing, and one for what it is asked to listen on.
const FDS_PER_FORK: u64 = 8;

/// Descriptors of the daemon for everything else.
const FDS_RESERVED: u64 = 256;

/// Threads that serve the API. A request costs some 50 us of the daemon; more threads would only wake each other, and take
/// the cores that forks are to run on.
pub fn api_workers() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| usize::from(cores).div_ceil(4))
}

/// Forks under construction at once: more only lengthens the queue for the cores.
pub fn spawns_in_flight() -> usize {
    2 * std::thread::available_parallelism().map_or(1, usize::from)
}

/// Parked forks under construction at once: refills leave cores to living forks.
pub fn refills_in_flight() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| usize::from(cores).div_ceil(2))
}

/// Raises the descriptor limit to its maximum and returns how many forks it allows.
pub fn raise_fd_limit() -> u64 {
    let now = getrlimit(Resource::Nofile);
    // Failure keeps the old limit, which the result is then computed from.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: now.maximum, maximum: now.maximum });
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20);
    limit.saturating_sub(FDS_RESERVED) / FDS_PER_FORK
}

/// `MemAvailable` of the host in MiB, if `/proc/meminfo` says so.
pub fn host_available_mib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}
