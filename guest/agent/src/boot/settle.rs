//! Moving the agent into one large page of memory.
//!
//! The pages of its file in the initramfs lie among those that the guest writes later. In a large page of their own they
//! are never written, so the host keeps them in one large page, too, and a fork made from nothing takes one fault for all
//! of the agent's code instead of a hundred.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::mount::{MountFlags, mount};

use crate::console;

/// The agent as the kernel starts it.
const FIRST: &str = "/init";

/// Where it goes, before anything else is mounted.
const MOUNT: &str = "/mnt/agent";

/// Starts the agent anew from memory of its own, with the same process id; returns when that is done already, or cannot be.
pub fn settle() {
    // Removed when it has moved.
    if Path::new(FIRST).exists() {
        let error = match move_and_start() {
            Ok(never) => match never {},
            Err(error) => error,
        };
        console::say(&format!("the agent stays in the initramfs: {error}"));
    }
}

fn move_and_start() -> io::Result<std::convert::Infallible> {
    fs::create_dir_all(MOUNT)?;
    mount("tmpfs", MOUNT, "tmpfs", MountFlags::NODEV, c"mode=0755,huge=always")?;
    let program = format!("{MOUNT}{FIRST}");
    fs::copy(FIRST, &program)?;
    fs::set_permissions(&program, Permissions::from_mode(0o755))?;
    fs::remove_file(FIRST)?;
    Err(Command::new(program).arg0(FIRST).args(std::env::args_os().skip(1)).exec())
}
