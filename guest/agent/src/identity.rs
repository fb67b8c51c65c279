//! Giving a fork its identity: random numbers, clock, host name, machine id, generation.
//!
//! All files are opened and mapped before the freeze, so that a fork only stores a line into each: a write through
//! overlayfs and tmpfs would be a hundred page faults in a fresh fork. In-place stores are as good as renames: no other
//! program runs in between (see [`crate::quiet`]).
//!
//! What this cannot reach is random state inside a program's own memory (a seeded Mersenne Twister, a TLS library's
//! pool): such programs need an on-fork hook, or wait on [`config::FORKPOINT_SOCKET`] and reseed when it answers.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use forkling_proto::config;
use forkling_proto::mailbox::{self, Header, Identity};
use forkling_proto::network::Network;
use rustix::fs::OFlags;
use rustix::time::{ClockId, Timespec};

use crate::network::Interface;
use crate::sys::mapped::MappedStart;
use crate::sys::random::Random;

const MACHINE_ID: &str = "/etc/machine-id";
const DBUS_MACHINE_ID: &str = "/var/lib/dbus/machine-id";
const HOSTNAME: &str = "/etc/hostname";

/// Characters of a machine id (machine-id(5)).
const MACHINE_ID_LEN: usize = 32;
/// Digits of the largest generation; smaller ones are padded, so that the file never changes its length.
const GENERATION_WIDTH: usize = 20;

/// Why a fork could not be given its identity; such a fork must not be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that shows identity cannot be opened for writing.
    #[error("cannot open {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Reason.
        source: io::Error,
    },
    /// A file that shows identity cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Reason.
        source: io::Error,
    },
    /// The fork would share random numbers with its siblings.
    #[error("cannot reseed the kernel's random numbers")]
    Reseed(#[source] io::Error),
    /// The wall clock was refused.
    #[error("cannot set the clock to {0} ns since 1970")]
    Clock(u64, #[source] io::Error),
    /// The NIC cannot be used or refused its addresses.
    #[error("cannot give the network interface its addresses")]
    Network(#[source] io::Error),
    /// The host name was refused.
    #[error("cannot set the host name {0:?}")]
    Hostname(String, #[source] io::Error),
}

/// Everything that is needed to apply an identity, opened.
#[derive(Debug)]
pub struct Applier {
    random: Random,
    generation: Slot,
    machine_id: Slot,
    dbus_machine_id: Option<Slot>,
    hostname: Slot,
    interface: Option<Interface>,
}

impl Applier {
    /// Opens what [`Self::apply`] writes. Called anew before each freeze: the workload may have replaced a file. `network`
    /// is the guest's place in the network until then.
    pub fn open(network: Option<Network>) -> Result<Self, Error> {
        let random = Random::open().map_err(|source| Error::Open { path: "/dev/urandom".into(), source })?;
        let dbus = Path::new(DBUS_MACHINE_ID);
        let dbus_is_file = dbus.symlink_metadata().is_ok_and(|found| found.is_file());
        Ok(Self {
            random,
            generation: Slot::open(config::GENERATION_FILE.as_ref(), GENERATION_WIDTH)?,
            machine_id: Slot::open(MACHINE_ID.as_ref(), MACHINE_ID_LEN)?,
            dbus_machine_id: dbus_is_file.then(|| Slot::open(dbus, MACHINE_ID_LEN)).transpose()?,
            hostname: Slot::open(HOSTNAME.as_ref(), mailbox::ID_LEN)?,
            interface: Interface::open(network).map_err(Error::Network)?,
        })
    }

    /// Applies what an identity says of the network, unless that was done before.
    pub fn prepare(&mut self, identity: &Identity) -> Result<(), Error> {
        match (&mut self.interface, identity.network) {
            (Some(interface), Some(network)) => interface.apply(network).map_err(Error::Network),
            _ => Ok(()),
        }
    }

    /// Applies an identity; random numbers come first, as every later step might draw some.
    ///
    /// The wall clock of `header` is that of `resumed`: every page touched since may have cost a fault, or a disk read.
    pub fn apply(&mut self, header: &Header, identity: &Identity, resumed: Instant) -> Result<(), Error> {
        self.random.reseed(&header.entropy).map_err(Error::Reseed)?;
        let passed = resumed.elapsed().as_nanos() as u64;
        let wall = header.wall_clock_ns.saturating_add(passed);
        let now = Timespec { tv_sec: (wall / 1_000_000_000) as i64, tv_nsec: (wall % 1_000_000_000) as i64 };
        rustix::time::clock_settime(ClockId::Realtime, now)
            .map_err(|errno| Error::Clock(wall, errno.into()))?;
        rustix::system::sethostname(identity.hostname.as_bytes())
            .map_err(|errno| Error::Hostname(identity.hostname.clone(), errno.into()))?;
        self.hostname.write(format_args!("{}\n", identity.hostname))?;
        self.machine_id.write(format_args!("{}\n", identity.machine_id))?;
        if let Some(slot) = &mut self.dbus_machine_id {
            slot.write(format_args!("{}\n", identity.machine_id))?;
        }
        self.prepare(identity)?;
        self.generation.write(format_args!("{:<GENERATION_WIDTH$}\n", header.generation))
    }
}

/// A small file whose whole content is replaced.
#[derive(Debug)]
struct Slot {
    path: PathBuf,
    file: File,
    start: MappedStart,
    len: usize,
    line: String,
}

impl Slot {
    /// Opens a file for lines that are usually `usual` characters and a newline long.
    fn open(path: &Path, usual: usize) -> Result<Self, Error> {
        let failed = |source| Error::Open { path: path.to_owned(), source };
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(failed)?;
        }
        // A symbolic link could lead anywhere, /dev/null included; a link is replaced by a file.
        if path.symlink_metadata().is_ok_and(|found| found.is_symlink()) {
            std::fs::remove_file(path).map_err(failed)?;
        }
        let no_follow = OFlags::NOFOLLOW.bits() as i32;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o644)
            .custom_flags(no_follow)
            .open(path)
            .map_err(failed)?;
        let len = usual + 1;
        if file.metadata().map_err(failed)?.len() != len as u64 {
            // Whoever reads it before the freeze finds a line that is no identity.
            let line = format!("{:-<usual$}\n", "template");
            file.write_all_at(line.as_bytes(), 0).and_then(|()| file.set_len(len as u64)).map_err(failed)?;
        }
        let start = MappedStart::new(&file).map_err(failed)?;
        Ok(Self { path: path.to_owned(), file, start, len, line: String::with_capacity(80) })
    }

    fn write(&mut self, content: std::fmt::Arguments<'_>) -> Result<(), Error> {
        self.line.clear();
        std::fmt::Write::write_fmt(&mut self.line, content).expect("writing to a String succeeds");
        if self.line.len() == self.len {
            self.start.overwrite(self.line.as_bytes());
            return Ok(());
        }
        self.replace().map_err(|source| Error::Write { path: self.path.clone(), source })
    }

    /// Writes a line of another length, by way of the kernel.
    fn replace(&mut self) -> io::Result<()> {
        self.file.write_all_at(self.line.as_bytes(), 0)?;
        self.len = self.line.len();
        self.file.set_len(self.len as u64)
    }
}

#[cfg(test)]
mod tests;
