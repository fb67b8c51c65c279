//! Scratch directories beside the templates: same file system, so that a finished one is committed by rename; a name
//! no template can have, so that the next daemon knows what to remove.

use std::{
    fs,
    io::{self, ErrorKind},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::tool;
use crate::identity::{base32, random};

const PREFIX: &str = ".scratch-";

/// Whether a directory of this name is scratch.
pub fn is_scratch(name: &str) -> bool {
    name.starts_with(PREFIX)
}

/// A new scratch name beside `path`.
pub fn beside(path: &Path) -> PathBuf {
    path.with_file_name(format!("{PREFIX}{}", base32(random())))
}

/// A scratch directory that is removed when it is dropped.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// In `parent`, for this user alone.
    pub fn new(parent: &Path) -> io::Result<Self> {
        let path = beside(&parent.join("x"));
        fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Gives it its final name; it is scratch no more.
    pub fn commit(self, name: &Path) -> Result<(), forkling_vmm::snapshot::Error> {
        forkling_vmm::snapshot::commit(&self.0, name)
        // Dropped now: its old name is gone, so nothing is removed.
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.0.exists() {
            let path = self.0.clone();
            // Thousands of files take a while, and drops happen on the runtime's threads.
            std::thread::spawn(move || remove(&path));
        }
    }
}

/// Removes a directory tree, also one whose files belong to this user's subordinate ids.
pub fn remove(path: &Path) {
    match fs::remove_dir_all(path) {
        Ok(()) => return,
        Err(error) if error.kind() == ErrorKind::NotFound => return,
        Err(_) => {}
    }
    let mut command = Command::new(tool::OWNER[0]);
    command
        .args(&tool::OWNER[1..])
        .args(["rm", "-rf", "--"])
        .arg(path)
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    match command.status() {
        Ok(status) if status.success() => {}
        _ => tracing::warn!(path = %path.display(), "cannot remove; remove it by hand"),
    }
}
