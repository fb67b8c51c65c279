//! Packets between a socket or TAP and guest memory, without a copy in between.
//!
//! What is read may change while the kernel reads it, and what is written may be overwritten by the guest: that is how
//! any device sees guest memory. No Rust reference to it is made.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use vm_memory::{GuestAddress, GuestMemory, Permissions, VolatileSlice};

use crate::memory::GuestRam;

/// A range of guest memory: start, and length in bytes.
pub type Piece = (GuestAddress, usize);

/// Writes one packet: the bytes of `pieces`, in order. Never blocks.
///
/// # Errors
/// `WouldBlock`: there is no room; those of writev(2); `InvalidInput`: a piece is not in guest memory.
pub fn send(
    fd: BorrowedFd<'_>,
    ram: &GuestRam,
    pieces: impl Iterator<Item = Piece>,
    vectors: &mut Vectors,
) -> io::Result<usize> {
    vectors.collect(ram, pieces, Permissions::Read)?;
    // SAFETY: every vector is a range of guest memory, which is mapped as long as the process lives (`Mapping`), and the
    // kernel only reads it.
    let sent = unsafe { libc::writev(fd.as_raw_fd(), vectors.0.as_ptr(), vectors.0.len() as i32) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Reads one packet into `pieces`, in order, and what does not fit there into `rest`. Returns the packet's length, 0 for
/// the end; what fits nowhere is lost. Never blocks if the descriptor does not.
///
/// # Errors
/// `WouldBlock`: there is none; those of readv(2); `InvalidInput`: a piece is not in guest memory.
pub fn receive(
    fd: BorrowedFd<'_>,
    ram: &GuestRam,
    pieces: impl Iterator<Item = Piece>,
    rest: &mut [u8],
    vectors: &mut Vectors,
) -> io::Result<usize> {
    vectors.collect(ram, pieces, Permissions::Write)?;
    vectors.0.push(libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() });
    // SAFETY: every vector but the last is a range of guest memory, which is mapped writable as long as the process
    // lives (`Mapping`) and holds no Rust object; the last is `rest`, borrowed for the call.
    let received = unsafe { libc::readv(fd.as_raw_fd(), vectors.0.as_ptr(), vectors.0.len() as i32) };
    vectors.0.clear();
    usize::try_from(received).map_err(|_| io::Error::last_os_error())
}

/// The ranges of guest memory that `pieces` consist of; it ends early at a piece that is not in guest memory.
pub fn slices<'a>(
    ram: &'a GuestRam,
    pieces: impl Iterator<Item = Piece> + 'a,
) -> impl Iterator<Item = VolatileSlice<'a>> {
    pieces
        .map_while(|(start, len)| ram.get_slices(start, len, Permissions::Read).ok())
        .flatten()
        .map_while(Result::ok)
}

/// Room for the kernel's description of a packet, kept between packets.
#[derive(Default)]
pub struct Vectors(Vec<libc::iovec>);

// SAFETY: between two calls the vectors are never followed; `collect` makes them anew for each.
unsafe impl Send for Vectors {}

impl Vectors {
    fn collect(
        &mut self,
        ram: &GuestRam,
        pieces: impl Iterator<Item = Piece>,
        access: Permissions,
    ) -> io::Result<()> {
        self.0.clear();
        let outside = |_| io::Error::from(io::ErrorKind::InvalidInput);
        for (start, len) in pieces {
            for slice in ram.get_slices(start, len, access).map_err(outside)? {
                self.0.push(vector(&slice.map_err(outside)?));
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for Vectors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vectors").finish_non_exhaustive()
    }
}

fn vector(slice: &VolatileSlice<'_>) -> libc::iovec {
    // Guest memory needs no guard to stay mapped.
    libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() }
}
