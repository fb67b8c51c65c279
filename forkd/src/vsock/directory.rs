//! Where the sockets of forks lie: RUNTIME_DIR/forks/ID, for the daemon's user and group, like the daemon's own socket.

use std::{
    fs::{self, File, Permissions},
    io,
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

use crate::config::{Error, make_directory};

/// Under the runtime directory.
const FORKS: &str = "forks";

/// Mode of the directory of all forks.
const ALL_MODE: u32 = 0o750;

/// Mode of a fork's directory: who may use the API may listen there for the guest.
const MODE: u32 = 0o770;

/// Mode of sockets.
const SOCKET_MODE: u32 = 0o660;

/// A fork's directory. Dropped, it is removed with all in it.
#[derive(Debug)]
pub struct Directory(PathBuf);

impl Directory {
    /// Makes the directory of fork `id`, a valid name.
    pub fn make(runtime_dir: &Path, id: &str) -> Result<Self, Error> {
        let all = runtime_dir.join(FORKS);
        make_directory(&all, ALL_MODE)?;
        let path = all.join(id);
        make_directory(&path, MODE)?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "cannot remove the sockets of a fork");
        }
    }
}

/// Listens on `path`, without blocking.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, Permissions::from_mode(SOCKET_MODE))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Removes what a killed daemon left, unless another one lives with the same runtime directory. What is returned keeps
/// others from doing that to this one.
pub fn sweep(runtime_dir: &Path) -> io::Result<File> {
    fs::create_dir_all(runtime_dir)?;
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(runtime_dir.join(format!("{FORKS}.lock")))?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
        match fs::remove_dir_all(runtime_dir.join(FORKS)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    flock(&lock, FlockOperation::LockShared)?;
    Ok(lock)
}
