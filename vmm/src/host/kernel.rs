//! The kernel outside of KVM, and the limits of this process.

use std::fs;

use rustix::{
    fs::{Access, access},
    process::{Resource, getrlimit},
};

use super::Line;
use crate::sys::{
    memfd::SealedMemory,
    probe::has_pagemap_scan,
    uffd::{Scope, Uffd},
};

/// Looks at everything but KVM.
pub(super) fn probe() -> Vec<Line> {
    let mut lines =
        vec![kernel(), memory(), user_fault(), sealed_memory(), cgroup(), pagemap_scan(), huge_pages()];
    lines.extend(cgroup_changes());
    lines.push(vm_statistics());
    lines.extend(limits());
    lines
}

/// Major and minor number of a release like `6.18.44-cloud`.
pub(super) fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn kernel() -> Line {
    const NAME: &str = "kernel";
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    match version(&release) {
        // Minor faults on shmem.
        Some(version) if version < (5, 14) => Line::missing(NAME, release, "use Linux 5.14 or later"),
        // Commit 7d9a0273c459: a memslot waits for a grace period if something is on an I/O bus already.
        Some((6, 18)) => {
            Line::ok(NAME, format!("{release}; memslots after an irqchip are slow, none is made so"))
        }
        Some(_) => Line::ok(NAME, release),
        None => Line::degraded(NAME, format!("unknown release {release}"), "report it"),
    }
}

fn memory() -> Line {
    const NAME: &str = "available memory";
    const WISHED_MIB: u64 = 1024;
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: Option<u64> = line.and_then(|l| l.split_ascii_whitespace().next()).and_then(|n| n.parse().ok());
    match kib.map(|kib| kib >> 10) {
        None => Line::degraded(NAME, "unknown", "mount /proc"),
        Some(mib) if mib < WISHED_MIB => {
            Line::degraded(NAME, format!("{mib} MiB"), format!("templates want {WISHED_MIB} MiB and more"))
        }
        Some(mib) => Line::ok(NAME, format!("{mib} MiB")),
    }
}

fn user_fault() -> Line {
    const NAME: &str = "userfaultfd";
    const REMEDY: &str = "let the group open the device: chgrp kvm /dev/userfaultfd && chmod 660 /dev/userfaultfd; \
                          until then templates are loaded as a whole";
    match Uffd::new(Scope::UserAndKernel) {
        Ok(_) if access("/dev/userfaultfd", Access::READ_OK | Access::WRITE_OK).is_ok() => {
            Line::ok(NAME, "by /dev/userfaultfd")
        }
        Ok(_) => Line::ok(NAME, "by the system call"),
        Err(error) => Line::degraded(NAME, format!("not for faults of KVM: {error}"), REMEDY),
    }
}

fn sealed_memory() -> Line {
    const NAME: &str = "sealed memfd";
    match SealedMemory::new("forkling-probe", crate::memory::layout::PAGE) {
        Ok(_) => Line::ok(NAME, "available"),
        Err(error) => {
            Line::missing(NAME, error.to_string(), "allow memfd_create (a seccomp filter may forbid it)")
        }
    }
}

fn cgroup() -> Line {
    const NAME: &str = "cgroup v2";
    const REMEDY: &str = "forks run without limits of their own; run under systemd with Delegate=yes";
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(mount) = cgroup_mount(&mounts) else {
        return Line::degraded(
            NAME,
            "not mounted",
            format!("mount -t cgroup2 cgroup2 /sys/fs/cgroup; {REMEDY}"),
        );
    };
    let path = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/").trim_end_matches('/');
    let directory = format!("{mount}{path}");
    if access(&directory, Access::WRITE_OK).is_ok() {
        Line::ok(NAME, format!("{directory} is writable"))
    } else {
        Line::degraded(NAME, format!("{directory} is not writable"), REMEDY)
    }
}

/// Before Linux 6.13 each new VM moves a kernel thread into its cgroup, and that waits for a grace period.
fn cgroup_changes() -> Option<Line> {
    const NAME: &str = "cgroup favordynmods";
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    if version(&release).is_none_or(|version| version >= (6, 13)) {
        return None;
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mount = cgroup_mount(&mounts)?;
    Some(if favors_changes(&mounts) {
        Line::ok(NAME, "set: a new VM does not wait for a grace period")
    } else {
        let remedy = format!("mount -o remount,favordynmods {mount} (Linux 6.0 and later)");
        Line::degraded(NAME, "not set: each new VM waits for a grace period, some 10 ms", remedy)
    })
}

/// KVM makes some forty files of statistics for each VM where debugfs is there at all, mounted or not.
fn vm_statistics() -> Line {
    const NAME: &str = "KVM statistics in debugfs";
    if offers_debugfs(&fs::read_to_string("/proc/filesystems").unwrap_or_default()) {
        let remedy = "boot a host of many forks with debugfs=off";
        Line::degraded(NAME, "on: 60 KiB and 0.2 ms for each VM", remedy)
    } else {
        Line::ok(NAME, "off: nothing is spent on them")
    }
}

/// Whether a kernel with these `/proc/filesystems` (filesystems(5)) has debugfs.
pub(super) fn offers_debugfs(filesystems: &str) -> bool {
    filesystems.lines().any(|line| line.split_whitespace().next_back() == Some("debugfs"))
}

/// Whether the first cgroup2 file system is mounted with `favordynmods` (Documentation/admin-guide/cgroup-v2.rst).
pub(super) fn favors_changes(mountinfo: &str) -> bool {
    mountinfo
        .lines()
        .filter_map(|line| line.split_once(" - "))
        .find_map(|(_, after)| after.strip_prefix("cgroup2 "))
        .is_some_and(|after| after.split([' ', ',']).any(|option| option == "favordynmods"))
}

/// Mount point of the first cgroup2 file system (proc_pid_mountinfo(5)).
pub(super) fn cgroup_mount(mountinfo: &str) -> Option<&str> {
    mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        if after.split(' ').next()? == "cgroup2" { before.split(' ').nth(4) } else { None }
    })
}

fn pagemap_scan() -> Line {
    const NAME: &str = "PAGEMAP_SCAN";
    match has_pagemap_scan() {
        Ok(true) => Line::ok(NAME, "available"),
        Ok(false) => Line::degraded(NAME, "not available", "Linux 6.7 lists a fork's private pages faster"),
        Err(error) => Line::degraded(NAME, format!("/proc/self/pagemap: {error}"), "mount /proc"),
    }
}

fn huge_pages() -> Line {
    const NAME: &str = "shmem huge pages";
    let setting = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    let chosen = setting.split('[').nth(1).and_then(|rest| rest.split(']').next()).unwrap_or("unknown");
    match chosen {
        "never" | "deny" | "unknown" => {
            let remedy =
                "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled, for images in 2 MiB pages";
            Line::degraded(NAME, chosen, remedy)
        }
        other => Line::ok(NAME, other),
    }
}

fn limits() -> Vec<Line> {
    // A fork is a process, with a handful of descriptors in the daemon and a few dozen mappings.
    let wished = [
        ("open files (RLIMIT_NOFILE)", getrlimit(Resource::Nofile).current, 16_384, "LimitNOFILE=1048576"),
        ("processes (RLIMIT_NPROC)", getrlimit(Resource::Nproc).current, 4096, "LimitNPROC=infinity"),
        ("locked memory (RLIMIT_MEMLOCK)", getrlimit(Resource::Memlock).current, 64 << 10, "LimitMEMLOCK=8M"),
    ];
    let mut lines: Vec<_> = wished
        .into_iter()
        .map(|(name, limit, least, setting)| match limit {
            None => Line::ok(name, "unlimited"),
            Some(limit) if limit < least => Line::degraded(
                name,
                limit.to_string(),
                format!("1000 forks want {least}; systemd: {setting}"),
            ),
            Some(limit) => Line::ok(name, limit.to_string()),
        })
        .collect();
    let maps = fs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
    lines.push(match maps.trim().parse::<u64>() {
        Ok(count) if count < 65_530 => {
            Line::degraded("vm.max_map_count", count.to_string(), "sysctl vm.max_map_count=65530")
        }
        Ok(count) => Line::ok("vm.max_map_count", count.to_string()),
        Err(_) => Line::degraded("vm.max_map_count", "unknown", "mount /proc"),
    });
    lines
}
