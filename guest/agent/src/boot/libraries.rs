//! Keeping the dynamic loader and the C library of the root file system in large pages of memory.
//!
//! Every dynamically linked program maps them. From the root, which has no page cache (DAX), each of their pages is a fault of its
//! own in every new process, and a fault of the guest in every fork made from nothing. In large pages the guest maps sixteen at
//! once, and the host keeps them in large pages, too, since nobody writes to them. They are a layer of the root between what is
//! read-only and what is writable, and can be replaced like any other file.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, FileTimes, Metadata, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::console;
use crate::sys::command::enter_root;

/// A program that every root has, and that is linked as its others are.
const PROGRAM: &str = "/bin/sh";

/// Has the loader name what it would load, and load nothing (ld.so(8)).
const TRACE: &str = "LD_TRACE_LOADED_OBJECTS";

/// Bytes of a large page, which each library takes at least one of.
const LARGE_PAGE: u64 = 2 << 20;

/// One part in so many of the guest's memory may go into this.
const SHARE: u64 = 32;

/// Makes the layer at `layer`, an empty directory, from the file system at `root`. Returns whether there is one: nothing depends on it.
pub fn gather(root: &Path, layer: &Path) -> bool {
    match copy_into(root, layer) {
        Ok(copied) => copied,
        Err(error) => {
            console::say(&format!("the C library stays in the root image: {error}"));
            false
        }
    }
}

fn copy_into(root: &Path, layer: &Path) -> io::Result<bool> {
    let libraries = loaded(root)?;
    let mut needed = 0;
    for library in &libraries {
        needed += fs::metadata(below(root, library))?.len().next_multiple_of(LARGE_PAGE);
    }
    let memory = rustix::system::sysinfo();
    if needed == 0 || needed > memory.totalram as u64 * u64::from(memory.mem_unit) / SHARE {
        return Ok(false);
    }
    mount("tmpfs", layer, "tmpfs", MountFlags::NODEV, c"mode=0755,huge=always")?;
    let copied = libraries.iter().try_for_each(|library| copy(root, layer, library));
    if copied.is_err() {
        // Half of it would only take memory.
        unmount(layer, UnmountFlags::empty())?;
    }
    copied.map(|()| true)
}

/// What [`PROGRAM`] loads, as paths in `root` without symbolic links. Nothing if it is linked statically.
fn loaded(root: &Path) -> io::Result<BTreeSet<PathBuf>> {
    let mut command = Command::new(PROGRAM);
    command.args(["-c", ":"]).env_clear().env(TRACE, "1").stdin(Stdio::null()).stderr(Stdio::null());
    enter_root(&mut command, root)?;
    let output = command.output()?.stdout;
    let words = output.split(u8::is_ascii_whitespace).filter(|word| word.starts_with(b"/"));
    words.map(|word| resolve(root, Path::new(OsStr::from_bytes(word)))).collect()
}

/// `path` of the file system at `root` without symbolic links; those that lead out of it lead to its own root.
fn resolve(root: &Path, path: &Path) -> io::Result<PathBuf> {
    let directory = File::open(root)?;
    let inside = path.strip_prefix("/").map_err(io::Error::other)?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let found = rustix::fs::openat2(&directory, inside, flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
    let target = fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))?;
    let inside = target.strip_prefix(root).map_err(io::Error::other)?;
    Ok(Path::new("/").join(inside))
}

/// Copies the file at `path` of the one file system to the other, with the directories it is in; all look as they did.
fn copy(from: &Path, to: &Path, path: &Path) -> io::Result<()> {
    let directories: Vec<&Path> = path.ancestors().skip(1).filter(|path| path.parent().is_some()).collect();
    for directory in directories.iter().rev() {
        let (original, copy) = (below(from, directory), below(to, directory));
        if !copy.exists() {
            DirBuilder::new().mode(0o700).create(&copy)?;
            resemble(&copy, &original)?;
        }
    }
    let (original, target) = (below(from, path), below(to, path));
    fs::copy(&original, &target)?;
    resemble(&target, &original)?;
    // What was put into it has changed its times.
    directories
        .iter()
        .try_for_each(|directory| set_times(&below(to, directory), &below(from, directory).metadata()?))
}

fn resemble(copy: &Path, original: &Path) -> io::Result<()> {
    let look = original.metadata()?;
    // One byte holds no name: none there is, or an error.
    if rustix::fs::listxattr(original, &mut [0_u8; 1]) != Ok(0) {
        return Err(io::Error::other(format!("{} may have extended attributes", original.display())));
    }
    chown(copy, Some(look.uid()), Some(look.gid()))?;
    fs::set_permissions(copy, Permissions::from_mode(look.mode()))?;
    set_times(copy, &look)
}

fn set_times(path: &Path, look: &Metadata) -> io::Result<()> {
    let times = FileTimes::new().set_accessed(look.accessed()?).set_modified(look.modified()?);
    File::open(path)?.set_times(times)
}

fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

#[cfg(test)]
mod tests;
