//! TAP devices and the network namespace they live in (Linux, Documentation/networking/tuntap.rst; tun(4), netns(7)).

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{FileType, OFlags, fstat},
    thread::UnshareFlags,
};

/// Where TAP devices come from.
pub const TUN_DEVICE: &str = "/dev/net/tun";

/// Longest name of an interface in bytes: IFNAMSIZ less the final zero.
pub const MAX_NAME: usize = libc::IFNAMSIZ - 1;

/// Length of the header that each packet begins with: `virtio_net_hdr_v1`.
static HEADER: libc::c_int = 12;

// linux/if_tun.h; libc has them for some targets only.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUN_F_CSUM: libc::c_ulong = 1 << 0;
const TUN_F_TSO4: libc::c_ulong = 1 << 1;
const TUN_F_TSO6: libc::c_ulong = 1 << 2;

/// What whoever reads a TAP takes upon itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums that are not filled in. Without it there is no segmentation either.
    pub checksum: bool,
    /// TCP over IPv4 in segments of up to 64 KiB.
    pub tso4: bool,
    /// The same over IPv6.
    pub tso6: bool,
}

impl Offloads {
    /// All of them.
    pub const ALL: Self = Self { checksum: true, tso4: true, tso6: true };
}

/// Makes a TAP device with this name in the network namespace of the calling thread. Packets are those of a frame socket;
/// the descriptor does not block, and the device goes when its last copy is closed. It is down, and all offloads are on.
///
/// # Errors
/// No [`TUN_DEVICE`]; `EPERM`: no CAP_NET_ADMIN; `EBUSY`: the name is taken; `InvalidInput`: it is longer than [`MAX_NAME`].
pub fn open(name: &str) -> io::Result<OwnedFd> {
    if name.is_empty() || name.len() > MAX_NAME {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let file = std::os::unix::fs::OpenOptionsExt::custom_flags(File::options().read(true).write(true), flags)
        .open(TUN_DEVICE)?;
    // SAFETY: all zeros are a valid value of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives as long as the call.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
    check(done)?;
    // SAFETY: TUNSETVNETHDRSZ reads one `int`, which lives as long as the call.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const HEADER) };
    check(done)?;
    set_offloads(file.as_fd(), Offloads::ALL)?;
    Ok(file.into())
}

/// Says what the reader of a TAP takes upon itself.
///
/// # Errors
/// `ENOTTY` and `EINVAL`: it is no TAP.
pub fn set_offloads(tap: BorrowedFd<'_>, offloads: Offloads) -> io::Result<()> {
    let bit = |on: bool, bit| if on { bit } else { 0 };
    let segments = bit(offloads.tso4, TUN_F_TSO4) | bit(offloads.tso6, TUN_F_TSO6);
    let flags = if offloads.checksum { TUN_F_CSUM | segments } else { 0 };
    // SAFETY: TUNSETOFFLOAD takes a number.
    let done = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETOFFLOAD, flags) };
    check(done)
}

/// Whether a NIC's descriptor is a TAP and not a frame socket: it is a character device.
pub fn is_tap(fd: BorrowedFd<'_>) -> bool {
    fstat(fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice)
}

/// Gives the calling thread a network namespace of its own, empty but for a loopback device. It goes with the thread, its
/// children and the descriptors made in it.
///
/// # Errors
/// `EPERM`: no CAP_SYS_ADMIN; `ENOSPC`: the limit of namespaces is reached.
pub fn leave_network() -> io::Result<()> {
    // SAFETY: without CLONE_FILES no other thread's descriptors are concerned.
    let done = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) };
    Ok(done?)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
