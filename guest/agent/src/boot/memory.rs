//! Memory of the guest: moved together before it is frozen, and then left alone.
//!
//! What forks allocate comes from the free memory of the template. In one piece it needs fewer page tables in each fork, of the guest's
//! memory in the host and of the host's memory for the guest, and fewer pages of the kernel's own records of pages are written.

use std::io::ErrorKind;
use std::path::Path;

use super::Error;
use crate::console;

const COMPACT: &str = "/proc/sys/vm/compact_memory";

/// What wakes an idle guest again and again, and how to have it do so rarely or never (Documentation/admin-guide/sysctl/vm.rst):
/// compaction ahead of need every 0.5 s, and the statistics of memory every second. A host has a thousand idle forks.
const IDLE: [(&str, &str); 2] =
    [("/proc/sys/vm/compaction_proactiveness", "0"), ("/proc/sys/vm/stat_interval", "30")];

/// Keeps the kernel from looking after memory while nothing happens.
pub fn stay_idle() -> Result<(), Error> {
    for (path, value) in IDLE {
        // A kernel that does not do such a thing has no setting for it.
        if Path::new(path).exists() {
            std::fs::write(path, value).map_err(|source| Error::File {
                doing: "write",
                path: path.into(),
                source,
            })?;
        }
    }
    Ok(())
}

/// Compacts memory (Documentation/admin-guide/sysctl/vm.rst). Nothing depends on it.
pub fn compact() {
    match std::fs::write(COMPACT, "1") {
        // A kernel without compaction.
        Err(error) if error.kind() != ErrorKind::NotFound => {
            console::say(&format!("memory is not compacted: {error}"));
        }
        _ => {}
    }
}
