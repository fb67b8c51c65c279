//! File access relative to a snapshot's directory: no absolute paths, no links followed, lengths bounded.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::{Damage, Error, damaged, io_error};

/// An open directory.
pub(super) struct Dir(OwnedFd);

impl Dir {
    /// Opens the directory at `path`.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = fs::open(path, flags, Mode::empty())
            .map_err(|error| io_error("open", path.display().to_string())(error.into()))?;
        Ok(Self(fd))
    }

    /// Uses a descriptor of a directory.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Opens a regular file for reading. Anything else that has its name is refused, and not waited for.
    pub fn open_file(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY;
        let open = |flags| fs::openat(&self.0, name, flags, Mode::empty());
        // A pipe would be waited for until someone writes to it.
        let fd = match open(flags | OFlags::NONBLOCK) {
            // Someone holds a lease on the file and has to give it up first (fcntl(2)).
            Err(Errno::WOULDBLOCK) => open(flags)?,
            result => result?,
        };
        let kind = FileType::from_raw_mode(fs::fstat(&fd)?.st_mode);
        if kind != FileType::RegularFile {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
        }
        Ok(File::from(fd))
    }

    /// Removes a file.
    pub fn remove_file(&self, name: &str) -> io::Result<()> {
        Ok(fs::unlinkat(&self.0, name, AtFlags::empty())?)
    }

    /// Gives a file another name, in place of what had it.
    pub fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(fs::renameat(&self.0, from, &self.0, to)?)
    }

    /// Creates a file that must not exist yet.
    pub fn create_file(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(File::from(fs::openat(&self.0, name, flags, Mode::from_raw_mode(0o644))?))
    }

    /// Creates a directory unless it exists.
    pub fn create_dir(&self, name: &str) -> io::Result<()> {
        match fs::mkdirat(&self.0, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads a file of at most `limit` bytes.
    pub fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, Error> {
        let file = self.open_file(name).map_err(io_error("open", name))?;
        let mut bytes = Vec::new();
        file.take(limit + 1).read_to_end(&mut bytes).map_err(io_error("read", name))?;
        if bytes.len() as u64 > limit {
            return Err(damaged(name, Damage::Length { expected: limit, found: bytes.len() as u64 }));
        }
        Ok(bytes)
    }

    /// Creates a file with these contents and makes them durable.
    pub fn write_durably(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let mut file = self.create_file(name).map_err(io_error("create", name))?;
        file.write_all(bytes).map_err(io_error("write", name))?;
        file.sync_all().map_err(io_error("sync", name))
    }

    /// Makes everything on the directory's file system durable: one call where thousands of fsync would be needed.
    pub fn sync_file_system(&self) -> io::Result<()> {
        Ok(fs::syncfs(self.0.as_fd())?)
    }

    /// Makes the directory's entries durable.
    pub fn sync(&self) -> io::Result<()> {
        Ok(fs::fsync(self.0.as_fd())?)
    }

    /// Kind, length and number of links of what has this name; links are not followed.
    pub fn stat(&self, name: &str) -> io::Result<fs::Stat> {
        Ok(fs::statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Gives a file a second name, in another directory.
    pub fn link(&self, name: &str, into: &Self, new: &str) -> Result<(), Errno> {
        fs::linkat(&self.0, name, &into.0, new, AtFlags::empty())
    }

    /// Names of all entries.
    pub fn names(&self) -> io::Result<Vec<String>> {
        Self::names_of(self.0.as_fd())
    }

    /// Names of all entries of a directory in it.
    pub fn names_in(&self, name: &str) -> io::Result<Vec<String>> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Self::names_of(fs::openat(&self.0, name, flags, Mode::empty())?.as_fd())
    }

    fn names_of(directory: BorrowedFd<'_>) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::Dir::read_from(directory)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        Ok(names)
    }
}
