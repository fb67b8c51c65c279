//! Mounting the root file system and moving into it.

use std::ffi::CString;
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

use forkling_proto::config::{GuestConfig, Root};
use rustix::mount::MountFlags;

use super::{Error, libraries};
use crate::console;
use crate::quiet::CGROUPS;

const DEVICE: &str = "/dev/pmem0";
const DEVICE_LIMIT: Duration = Duration::from_secs(10);

/// Mount points in the initramfs.
const LOWER: &str = "/mnt/lower";
const LIBRARIES: &str = "/mnt/libraries";
const WRITABLE: &str = "/mnt/writable";
const ROOT: &str = "/mnt/root";

const PLAIN: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// Mounts what modules and device nodes need; they move along into the root file system later.
pub(super) fn mount_kernel_interfaces() -> Result<(), Error> {
    mount("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, "mode=0755")?;
    mount("proc", "/proc", "proc", PLAIN, "")?;
    mount("sysfs", "/sys", "sysfs", PLAIN, "")?;
    mount("tmpfs", "/run", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, "mode=0755")
}

/// Enters the root file system `config` names.
pub(super) fn enter(config: &GuestConfig) -> Result<(), Error> {
    if config.root == Root::Initramfs {
        return Ok(());
    }
    wait_for_device()?;
    for directory in [LOWER, LIBRARIES, WRITABLE, ROOT] {
        make_directory(directory, 0o755)?;
    }
    mount(DEVICE, LOWER, "erofs", MountFlags::RDONLY, "dax=always")?;
    let size = match config.overlay_mib {
        0 => "size=50%".to_owned(),
        mib => format!("size={mib}m"),
    };
    mount("tmpfs", WRITABLE, "tmpfs", MountFlags::empty(), &format!("mode=0755,{size}"))?;
    let (upper, work) = (format!("{WRITABLE}/upper"), format!("{WRITABLE}/work"));
    make_directory(&upper, 0o755)?;
    make_directory(&work, 0o755)?;
    let lower = if libraries::gather(Path::new(LOWER), Path::new(LIBRARIES)) {
        format!("{LIBRARIES}:{LOWER}")
    } else {
        LOWER.to_owned()
    };
    let layers = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    mount("overlay", ROOT, "overlay", MountFlags::empty(), &layers)?;
    for name in ["/dev", "/proc", "/sys", "/run"] {
        let target = format!("{ROOT}{name}");
        make_directory(&target, 0o755)?;
        rustix::mount::mount_move(name, &target).map_err(|errno| failed(name, &target, errno.into()))?;
    }
    switch(ROOT)
}

/// Makes the mount at `root` the root of this process and thereby of all its children. The initramfs stays below it,
/// out of reach, with nothing left in it but the running agent.
fn switch(root: &str) -> Result<(), Error> {
    let step = |doing, result: rustix::io::Result<()>| {
        result.map_err(|errno| Error::File { doing, path: root.into(), source: errno.into() })
    };
    step("enter", rustix::process::chdir(root))?;
    step("move to /", rustix::mount::mount_move(".", "/"))?;
    step("make the root of", rustix::process::chroot("."))?;
    step("enter /, formerly", rustix::process::chdir("/"))
}

/// Mounts and links that programs expect of a running system.
pub(super) fn complete() -> Result<(), Error> {
    make_directory("/dev/pts", 0o755)?;
    let terminal = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount("devpts", "/dev/pts", "devpts", terminal, "gid=5,mode=620,ptmxmode=666")?;
    make_directory("/dev/shm", 0o1777)?;
    mount("tmpfs", "/dev/shm", "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, "mode=1777")?;
    mount("cgroup2", CGROUPS, "cgroup2", PLAIN, "")?;
    let links = [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ];
    for (link, target) in links {
        match symlink(target, link) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::File { doing: "make", path: link.into(), source });
            }
            _ => {}
        }
    }
    for (directory, mode) in [("/tmp", 0o1777), ("/etc", 0o755), ("/run/lock", 0o1777)] {
        make_directory(directory, mode)?;
        // The umask or an unusual root image may have left less.
        fs::set_permissions(directory, Permissions::from_mode(mode)).map_err(|source| Error::File {
            doing: "open up",
            path: directory.into(),
            source,
        })?;
    }
    Ok(())
}

/// The device appears some milliseconds after its driver is loaded.
fn wait_for_device() -> Result<(), Error> {
    let deadline = Instant::now() + DEVICE_LIMIT;
    while !Path::new(DEVICE).exists() {
        if Instant::now() > deadline {
            return Err(Error::NoRootDevice(DEVICE));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    console::say(&format!("{DEVICE} is there"));
    Ok(())
}

fn make_directory(path: &str, mode: u32) -> Result<(), Error> {
    if Path::new(path).is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(mode).create(path).map_err(|source| Error::File {
        doing: "make directory",
        path: path.into(),
        source,
    })
}

fn mount(source: &str, target: &str, kind: &str, flags: MountFlags, options: &str) -> Result<(), Error> {
    let options = CString::new(options).expect("mount options hold no NUL");
    rustix::mount::mount(source, target, kind, flags, options.as_c_str())
        .map_err(|errno| failed(kind, target, errno.into()))
}

fn failed(what: &str, target: &str, source: io::Error) -> Error {
    Error::Mount { what: what.to_owned(), target: target.to_owned(), source }
}
