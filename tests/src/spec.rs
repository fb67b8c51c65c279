//! Build specs: the null guest on any KVM, Debian where KVM runs a stock kernel.

use std::path::PathBuf;

use serde_json::{Value, json};

/// Memory of null templates in MiB.
pub const NULL_MIB: u32 = 64;

/// A null template.
pub fn null(name: &str, binary: &std::path::Path) -> Value {
    json!({"name": name, "payload": "null", "kernel": binary, "memory_mib": NULL_MIB})
}

/// A Debian template, from `$FORKLING_GUEST_DIR`: `kernel/{vmlinux,vmlinuz}`, `kernel/modules/VERSION`, `root-debian.erofs`.
///
/// # Panics
/// When the variable is not set.
pub fn debian(name: &str) -> Value {
    let guest = guest_dir();
    json!({
        "name": name,
        "kernel": guest.join("kernel/vmlinux"),
        "root": guest.join("root-debian.erofs"),
        "memory_mib": 256,
        // The emulator translates code once for each address at which it is mapped, and whoever clears such a page later waits for
        // every translation, byte by byte: with libraries at other addresses in each process, minutes for a template.
        "cmdline": "norandmaps",
    })
}

/// Where the Debian guest is.
///
/// # Panics
/// When `FORKLING_GUEST_DIR` is not set.
pub fn guest_dir() -> PathBuf {
    let directory = std::env::var_os("FORKLING_GUEST_DIR");
    directory.expect("FORKLING_GUEST_DIR names the directory with kernel and root; tests/run sets it").into()
}
