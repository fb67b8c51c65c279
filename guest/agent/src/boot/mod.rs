//! From the kernel's first user instruction to a complete file system.

mod libraries;
mod memory;
mod modules;
mod root;
mod settle;

use std::io;
use std::path::{Path, PathBuf};

use forkling_proto::config::{self, GuestConfig};
use rustix::process::{Resource, Rlimit};

use crate::{console, network, sys};

pub use memory::compact;
pub use settle::settle;

/// Why the guest does not come up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file system was not mounted.
    #[error("cannot mount {what} on {target}")]
    Mount {
        /// File system type or source.
        what: String,
        /// Mount point.
        target: String,
        /// Reason.
        source: io::Error,
    },
    /// A directory, link or file was not made or read.
    #[error("cannot {doing} {path}")]
    File {
        /// Verb.
        doing: &'static str,
        /// The path.
        path: PathBuf,
        /// Reason.
        source: io::Error,
    },
    /// The configuration in the initramfs is not one.
    #[error(
        "the guest configuration in the initramfs is malformed; it was made for another build of the agent"
    )]
    Config(#[source] postcard::Error),
    /// A kernel module was refused.
    #[error("cannot load kernel module {name}")]
    Module {
        /// File name.
        name: String,
        /// Reason.
        source: io::Error,
    },
    /// The root device is not there.
    #[error("{0} did not appear; does the VMM offer virtio-pmem, and are its modules loaded?")]
    NoRootDevice(&'static str),
    /// A setting of the kernel was refused.
    #[error("cannot {0}")]
    Setting(&'static str, #[source] io::Error),
}

/// Mounts, loads modules, enters the root file system; returns the configuration.
pub fn run() -> Result<GuestConfig, Error> {
    root::mount_kernel_interfaces()?;
    let config = read_config()?;
    modules::load(Path::new(config::MODULES_DIR), &config.modules)?;
    root::enter(&config)?;
    root::complete()?;
    sys::socket::bring_up_loopback()
        .map_err(|source| Error::Setting("bring up the loopback interface", source))?;
    if config.network {
        network::bring_up().map_err(|source| Error::Setting("bring up the network interface", source))?;
    }
    // The kernel's 1024 is too low for the streams of many commands side by side.
    let limit = Rlimit { current: Some(65_536), maximum: Some(1_048_576) };
    rustix::process::setrlimit(Resource::Nofile, limit)
        .map_err(|errno| Error::Setting("raise the limit of open files", errno.into()))?;
    rustix::system::sethostname(b"forkling")
        .map_err(|errno| Error::Setting("set the host name", errno.into()))?;
    unlimit_real_time()?;
    memory::stay_idle()?;
    console::say("the file systems are mounted");
    Ok(config)
}

/// Lets real-time tasks run without a limit. At a forkpoint the agent is one, possibly for minutes by the guest's clock;
/// the default limit of 95 % would then let other programs run before the fork has its identity (sched(7)).
fn unlimit_real_time() -> Result<(), Error> {
    let path = "/proc/sys/kernel/sched_rt_runtime_us";
    std::fs::write(path, "-1").map_err(|source| Error::File { doing: "write", path: path.into(), source })
}

fn read_config() -> Result<GuestConfig, Error> {
    let path = config::PATH;
    let bytes =
        std::fs::read(path).map_err(|source| Error::File { doing: "read", path: path.into(), source })?;
    postcard::from_bytes(&bytes).map_err(Error::Config)
}
