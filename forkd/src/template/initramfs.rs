//! Writes the initramfs of a template: the agent as `/init`, its configuration, its kernel modules.
//!
//! The format is "newc" cpio (kernel documentation, driver-api/early-userspace/buffer-format). The same input gives
//! the same bytes: fixed order, owner and time. The kernel unpacks archives put one behind the other, so a caller may
//! append another one, padded to four bytes, with more files.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use forkling_proto::config::{self, GuestConfig};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER: u32 = 0o020_000;
const DIRECTORIES: [&str; 8] = ["dev", "etc", "mnt", "modules", "proc", "run", "sys", "tmp"];

/// Why an initramfs cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The agent or a module cannot be read.
    #[error("cannot read {path}, which belongs into the guest's initramfs")]
    Read {
        /// The file.
        path: PathBuf,
        /// Reason.
        source: io::Error,
    },
    /// The output refused bytes.
    #[error("cannot write the initramfs")]
    Write(#[source] io::Error),
    /// A file is 4 GiB or more, which newc cannot express.
    #[error("{name} has {len} bytes, an initramfs holds files below 4 GiB")]
    TooLarge {
        /// Name in the archive.
        name: String,
        /// Its length in bytes.
        len: u64,
    },
    /// Changed in length while it was read.
    #[error("{path} changed while it was read; try again")]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// Two modules with one file name, or a path without one.
    #[error("{path} is not usable as a module: its file name must be UTF-8 and unique")]
    ModuleName {
        /// The file.
        path: PathBuf,
    },
    /// The configuration cannot be encoded.
    #[error("cannot encode the guest configuration")]
    Config(#[source] postcard::Error),
}

/// Writes an initramfs to `out`. `modules` are host paths in load order; the configuration in the archive is `config`
/// with [`GuestConfig::modules`] replaced by their file names, so that the two cannot disagree.
pub fn write(out: impl Write, agent: &Path, config: &GuestConfig, modules: &[PathBuf]) -> Result<(), Error> {
    let names = module_names(modules)?;
    let config = GuestConfig { modules: names.clone(), ..config.clone() };
    let encoded = postcard::to_allocvec(&config).map_err(Error::Config)?;
    let mut archive = Archive { out, inode: 0 };
    for name in DIRECTORIES {
        archive.node(name, DIRECTORY | 0o755, (0, 0))?;
    }
    // The kernel opens the console before it runs /init, which has not mounted /dev yet.
    archive.node("dev/console", CHARACTER | 0o600, (5, 1))?;
    archive.node("dev/null", CHARACTER | 0o666, (1, 3))?;
    archive.file("init", 0o755, agent)?;
    archive.bytes(config::PATH.trim_start_matches('/'), 0o600, &encoded)?;
    for (name, path) in names.iter().zip(modules) {
        archive.file(&format!("{}/{name}", config::MODULES_DIR.trim_start_matches('/')), 0o644, path)?;
    }
    archive.finish()
}

fn module_names(modules: &[PathBuf]) -> Result<Vec<String>, Error> {
    let mut seen = HashSet::new();
    modules
        .iter()
        .map(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            let unusable = || Error::ModuleName { path: path.clone() };
            let name = name.ok_or_else(unusable)?;
            if seen.insert(name) { Ok(name.to_owned()) } else { Err(unusable()) }
        })
        .collect()
}

struct Archive<W> {
    out: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    fn node(&mut self, name: &str, mode: u32, device: (u32, u32)) -> Result<(), Error> {
        self.header(name, mode, 0, device)
    }

    fn bytes(&mut self, name: &str, mode: u32, data: &[u8]) -> Result<(), Error> {
        let len = length(name, data.len() as u64)?;
        self.header(name, REGULAR | mode, len, (0, 0))?;
        self.put(data)?;
        self.pad(data.len() as u64)
    }

    fn file(&mut self, name: &str, mode: u32, path: &Path) -> Result<(), Error> {
        let unreadable = |source| Error::Read { path: path.to_owned(), source };
        let mut file = File::open(path).map_err(unreadable)?;
        let expected = file.metadata().map_err(unreadable)?.len();
        self.header(name, REGULAR | mode, length(name, expected)?, (0, 0))?;
        let mut buffer = vec![0; 64 * 1024];
        let mut left = expected;
        loop {
            let count = file.read(&mut buffer).map_err(unreadable)?;
            if count as u64 > left || (count == 0 && left > 0) {
                return Err(Error::Changed { path: path.to_owned() });
            }
            if count == 0 {
                return self.pad(expected);
            }
            self.put(&buffer[..count])?;
            left -= count as u64;
        }
    }

    fn finish(mut self) -> Result<(), Error> {
        self.header("TRAILER!!!", 0, 0, (0, 0))?;
        self.out.flush().map_err(Error::Write)
    }

    fn header(&mut self, name: &str, mode: u32, len: u32, device: (u32, u32)) -> Result<(), Error> {
        self.inode += 1;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let name_size = name.len() as u32 + 1;
        // inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name size, checksum
        let fields = [self.inode, mode, 0, 0, links, 0, len, 0, 0, device.0, device.1, name_size, 0];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        header.push_str(name);
        header.push('\0');
        self.put(header.as_bytes())?;
        self.pad(header.len() as u64)
    }

    fn put(&mut self, data: &[u8]) -> Result<(), Error> {
        self.out.write_all(data).map_err(Error::Write)
    }

    /// Zeroes up to the next multiple of four after `len` bytes.
    fn pad(&mut self, len: u64) -> Result<(), Error> {
        self.put(&[0; 3][..(len.next_multiple_of(4) - len) as usize])
    }
}

fn length(name: &str, len: u64) -> Result<u32, Error> {
    u32::try_from(len).map_err(|_| Error::TooLarge { name: name.to_owned(), len })
}

#[cfg(test)]
mod tests;
