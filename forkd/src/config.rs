//! Where the daemon keeps things, and what it was told on its command line.

use std::{
    env, io,
    net::{IpAddr, SocketAddr},
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use forkling_net::control::Settings;
use ipnet::Ipv4Net;

use crate::{
    admission,
    network::{self, TapSettings},
};

/// Longest socket path in bytes: `sun_path` of `unix(7)` less its final zero.
pub const MAX_SOCKET_PATH: usize = 107;

/// How long a template without forks stays in memory if nothing else is said, in seconds.
const IDLE_UNLOAD_S: u64 = 15 * 60;

/// How long a fork's devices have had nothing to do when it gives memory back if nothing else is said, in seconds.
const TRIM_AFTER_S: u32 = 2;

/// Shortest and longest prefix of the range of guests' addresses.
const MIN_RANGE: u8 = 8;
const MAX_RANGE: u8 = 29;

const DNS_PORT: u16 = 53;

/// Environment variable with the path of the daemon's socket.
pub const SOCKET_ENV: &str = "FORKLING_SOCKET";

/// Environment variable with the kernel for templates that name none.
pub const KERNEL_ENV: &str = "FORKLING_KERNEL";

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No directory can be derived from the environment.
    #[error("neither {0} nor HOME is set; set one, or give --{1}")]
    NoHome(&'static str, &'static str),
    /// The socket's path is too long for the kernel.
    #[error("socket path {path} has {len} bytes, more than {MAX_SOCKET_PATH}; give a shorter --socket")]
    SocketPath {
        /// The path.
        path: PathBuf,
        /// Its length.
        len: usize,
    },
    /// A directory cannot be made.
    #[error("cannot make directory {path}; give another by --state-dir or --runtime-dir")]
    Directory {
        /// Which.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The range of guests' addresses is too large or too small.
    #[error("--network-range {0} is not between a /{MIN_RANGE} and a /{MAX_RANGE}")]
    NetworkRange(Ipv4Net),
    /// The running program's own path is unknown.
    #[error("cannot find the running program; give --vmm and --agent")]
    NoProgram(#[source] io::Error),
}

/// Command line of `forkd`.
#[derive(Clone, Debug, clap::Parser)]
#[command(
    name = "forkd",
    version,
    about = "The Forkling daemon: serves forks of template VMs on a Unix socket"
)]
pub struct Args {
    /// Socket to listen on [default: RUNTIME_DIR/forkd.sock]
    #[arg(long, env = SOCKET_ENV, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Where templates are kept [default: /var/lib/forkling for root, else $XDG_DATA_HOME/forkling]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Where the sockets of the daemon and of forks lie [default: /run/forkling for root, else $XDG_RUNTIME_DIR/forkling]
    #[arg(long, value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,
    /// The VMM program [default: forkling-vmm beside this one]
    #[arg(long, value_name = "PATH")]
    pub vmm: Option<PathBuf>,
    /// The guest's agent [default: forkling-agent beside this program]
    #[arg(long, value_name = "PATH")]
    pub agent: Option<PathBuf>,
    /// Kernel for templates that name none [default: STATE_DIR/kernel/vmlinux if it is there]
    #[arg(long, env = KERNEL_ENV, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// Load images eagerly even where userfaultfd is available
    #[arg(long)]
    pub eager: bool,
    /// Do not copy ahead the pages that forks of a template are known to write first
    #[arg(long)]
    pub no_copy_ahead: bool,
    /// Keep no process ahead of need for the next fork of each template in use that no parked fork serves
    #[arg(long)]
    pub no_embryo: bool,
    /// Memory in MiB that forks must leave free [default: a 32nd of the host's, at least 256]
    #[arg(long, value_name = "MIB")]
    pub memory_reserve: Option<u32>,
    /// Memory in MiB that every fork is expected to take, at least
    #[arg(long, value_name = "MIB", default_value_t = 4)]
    pub fork_growth: u32,
    /// How much of what forks of a template were seen to take is set aside for another one
    #[arg(long, value_name = "FACTOR", default_value_t = 1.25, value_parser = factor)]
    pub memory_factor: f64,
    /// Forks that may wait for their construction; more are refused
    #[arg(long, value_name = "COUNT", default_value_t = crate::limits::MAX_QUEUE)]
    pub queue: u64,
    /// Unload templates that had no fork for so long; 0: never
    #[arg(long, value_name = "SECONDS", default_value_t = IDLE_UNLOAD_S)]
    pub idle_unload: u64,
    /// Forks that had nothing to do for so long give back the pages that are equal to their template's again, and keep only what differs
    /// of those that nearly are; 0: never
    #[arg(long, value_name = "SECONDS", default_value_t = TRIM_AFTER_S, value_parser = clap::value_parser!(u32).range(..=86_400))]
    pub trim_after: u32,
    /// Addresses of guests
    #[arg(long, value_name = "CIDR", default_value_t = default_range())]
    pub network_range: Ipv4Net,
    /// What carries the frames of forks: the daemon's own process, or TAP devices, which need privilege
    #[arg(long, value_enum, value_name = "BACKEND", default_value_t)]
    pub network: network::Backend,
    /// Most TAP devices, taken and ready ones together (--network tap)
    #[arg(long, value_name = "COUNT", default_value_t = crate::limits::MAX_TAPS, value_parser = clap::value_parser!(u32).range(1..))]
    pub taps: u32,
    /// Resolver that allowed names are asked of; may be given more than once [default: those of /etc/resolv.conf]
    #[arg(long = "resolver", value_name = "ADDRESS[:PORT]", value_parser = resolver)]
    pub resolvers: Vec<SocketAddr>,
}

fn default_range() -> Ipv4Net {
    let (address, prefix) = network::DEFAULT_RANGE;
    Ipv4Net::new(address, prefix).expect("a constant")
}

fn resolver(text: &str) -> Result<SocketAddr, String> {
    let with_port = text.parse().or_else(|_| text.parse().map(|address: IpAddr| (address, DNS_PORT).into()));
    with_port.map_err(|_| format!("{text:?} is not an address, or an address and a port"))
}

fn factor(text: &str) -> Result<f64, String> {
    let value = text.parse().map_err(|_| format!("{text:?} is not a number"))?;
    if (0.0..=1000.0).contains(&value) { Ok(value) } else { Err("not between 0 and 1000".to_owned()) }
}

/// Settings with every default filled in.
#[derive(Clone, Debug)]
pub struct Config {
    /// Socket to listen on.
    pub socket: PathBuf,
    /// Sockets of forks.
    pub runtime_dir: PathBuf,
    /// Templates, cache, generation mark.
    pub state_dir: PathBuf,
    /// Program of zygotes, forks and builders.
    pub vmm: PathBuf,
    /// Program of the guest's agent.
    pub agent: PathBuf,
    /// Default kernel.
    pub kernel: PathBuf,
    /// Load images eagerly.
    pub eager: bool,
    /// Copy ahead what forks are known to write.
    pub copy_ahead: bool,
    /// Keep an embryo for each template in use.
    pub embryo: bool,
    /// What forks are granted.
    pub admission: admission::Settings,
    /// How long a template without forks stays in memory; `None` for ever.
    pub idle_unload: Option<Duration>,
    /// When forks that had nothing to do give back memory; `None`: never.
    pub trim_after: Option<Duration>,
    /// The network of forks.
    pub network: Settings,
    /// Their taps, if they use any.
    pub taps: Option<TapSettings>,
}

impl Config {
    /// Fills in the defaults and makes the directories.
    pub fn new(args: Args) -> Result<Self, Error> {
        let runtime_dir = args.runtime_dir.map_or_else(default_runtime_dir, Ok)?;
        let state_dir = args.state_dir.map_or_else(default_state_dir, Ok)?;
        let socket = args.socket.unwrap_or_else(|| runtime_dir.join("forkd.sock"));
        let len = socket.as_os_str().len();
        if len > MAX_SOCKET_PATH {
            return Err(Error::SocketPath { path: socket, len });
        }
        if let Some(parent) = socket.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            // Group members may reach the socket; its own mode says who may connect.
            make_directory(parent, 0o755)?;
        }
        for directory in [state_dir.clone(), state_dir.join("templates"), state_dir.join("cache")] {
            make_directory(&directory, 0o700)?;
        }
        let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
        Ok(Self {
            socket,
            vmm: args.vmm.map_or_else(|| beside("forkling-vmm"), |path| Ok(absolute(path)))?,
            agent: args.agent.map_or_else(|| beside("forkling-agent"), |path| Ok(absolute(path)))?,
            kernel: args.kernel.map_or_else(|| state_dir.join("kernel/vmlinux"), absolute),
            runtime_dir: absolute(runtime_dir),
            state_dir: absolute(state_dir),
            eager: args.eager,
            copy_ahead: !args.no_copy_ahead,
            embryo: !args.no_embryo,
            admission: admission::Settings {
                reserve: args.memory_reserve.map(|mib| u64::from(mib) << 20),
                growth: u64::from(args.fork_growth) << 20,
                factor: args.memory_factor,
                queue: args.queue.min(1 << 32),
            },
            idle_unload: (args.idle_unload > 0).then(|| Duration::from_secs(args.idle_unload)),
            trim_after: (args.trim_after > 0).then(|| Duration::from_secs(args.trim_after.into())),
            taps: (args.network == network::Backend::Tap).then_some(TapSettings { taps: args.taps }),
            network: network_settings(args.network_range, args.resolvers)?,
        })
    }
}

fn network_settings(guests: Ipv4Net, resolvers: Vec<SocketAddr>) -> Result<Settings, Error> {
    if !(MIN_RANGE..=MAX_RANGE).contains(&guests.prefix_len()) {
        return Err(Error::NetworkRange(guests));
    }
    let resolvers = if resolvers.is_empty() { host_resolvers() } else { resolvers };
    Ok(Settings { guests: guests.trunc(), resolvers })
}

/// The `nameserver` lines of resolv.conf(5).
fn host_resolvers() -> Vec<SocketAddr> {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let servers = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    servers.filter_map(|server| resolver(server.trim()).ok()).collect()
}

/// Socket of the daemon a client talks to when it was told nothing.
pub fn default_socket() -> Result<PathBuf, Error> {
    Ok(default_runtime_dir()?.join("forkd.sock"))
}

fn default_runtime_dir() -> Result<PathBuf, Error> {
    if is_root() {
        return Ok("/run/forkling".into());
    }
    if let Some(dir) = absolute_env("XDG_RUNTIME_DIR") {
        return Ok(dir.join("forkling"));
    }
    // Hosts without a session manager set no runtime directory.
    Ok(absolute_env("HOME")
        .ok_or(Error::NoHome("XDG_RUNTIME_DIR", "runtime-dir"))?
        .join(".local/state/forkling"))
}

fn default_state_dir() -> Result<PathBuf, Error> {
    if is_root() {
        return Ok("/var/lib/forkling".into());
    }
    if let Some(dir) = absolute_env("XDG_DATA_HOME") {
        return Ok(dir.join("forkling"));
    }
    Ok(absolute_env("HOME").ok_or(Error::NoHome("XDG_DATA_HOME", "state-dir"))?.join(".local/share/forkling"))
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn absolute_env(name: &str) -> Option<PathBuf> {
    env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute())
}

/// `name` in the directory of the running program, or of its parent as Cargo lays out test programs.
fn beside(name: &str) -> Result<PathBuf, Error> {
    let program = env::current_exe().map_err(Error::NoProgram)?;
    let directory = program.parent().unwrap_or(Path::new("/"));
    Ok(directory.join(name))
}

/// Makes a directory with exactly this mode, and those above it. One that is there already is left as it is.
pub fn make_directory(path: &Path, mode: u32) -> Result<(), Error> {
    let fail = |source| Error::Directory { path: path.to_owned(), source };
    if path.is_dir() {
        return Ok(());
    }
    std::fs::DirBuilder::new().recursive(true).mode(mode).create(path).map_err(fail)?;
    // The mode given to mkdir(2) is subject to the umask.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(fail)
}
