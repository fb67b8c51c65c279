//! Loading kernel modules from the initramfs.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::io::Errno;

use super::Error;

/// `MODULE_INIT_COMPRESSED_FILE` of finit_module(2): the kernel unpacks the file.
const COMPRESSED: i32 = 4;

/// Loads the files `names` in `directory` in this order, then deletes them: they would only enlarge the snapshot.
pub(super) fn load(directory: &Path, names: &[String]) -> Result<(), Error> {
    for name in names {
        let path = directory.join(name);
        load_one(&path, flags(name)).map_err(|source| Error::Module { name: name.clone(), source })?;
    }
    match std::fs::remove_dir_all(directory) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(Error::File { doing: "delete", path: directory.to_owned(), source })
        }
        _ => Ok(()),
    }
}

fn load_one(path: &Path, flags: i32) -> io::Result<()> {
    match rustix::system::finit_module(File::open(path)?, c"", flags) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn flags(name: &str) -> i32 {
    if name.ends_with(".ko") { 0 } else { COMPRESSED }
}
