//! The kernel's random number generator (random(4), include/uapi/linux/random.h).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::check;

/// `_IOW('R', 0x03, int[2])`.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
/// `_IO('R', 0x07)`.
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

/// `struct rand_pool_info` with 64 bytes of data.
#[repr(C)]
struct PoolInfo {
    entropy_bits: libc::c_int,
    len: libc::c_int,
    data: [u8; 64],
}

/// The open generator; opened before the freeze so that a fork only needs the two ioctls.
#[derive(Debug)]
pub struct Random(File);

impl Random {
    /// Opens `/dev/urandom`.
    pub fn open() -> io::Result<Self> {
        File::open("/dev/urandom").map(Self)
    }

    /// Adds `entropy`, credits all of its bits, and makes every CPU's generator start from it; needs CAP_SYS_ADMIN.
    ///
    /// Crediting alone does nothing visible to a generator that is already seeded: it would go on with the key it
    /// shares with its siblings until its next periodic reseed.
    pub fn reseed(&self, entropy: &[u8; 64]) -> io::Result<()> {
        let info = PoolInfo { entropy_bits: 512, len: 64, data: *entropy };
        // SAFETY: the kernel reads `len` bytes behind the two integers, all of them inside `info`.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), RNDADDENTROPY, &raw const info) })?;
        // SAFETY: this request takes no argument.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), RNDRESEEDCRNG) })?;
        Ok(())
    }
}
