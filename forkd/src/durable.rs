//! Files that a crash leaves as they were or as they are to be.

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

/// Replaces the file at `path`, which is in a directory, or makes it. One caller at a time for each path.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("new");
    let mut file = fs::File::create(&beside)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    let directory = path.parent().expect("a file is in a directory");
    fs::File::open(directory)?.sync_all()
}
