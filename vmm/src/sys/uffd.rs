//! userfaultfd: faults of a fork as events, and the atomic insertion of pages into shared memory.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use rustix::fs::OFlags;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::UserfaultfdFlags;
use userfaultfd::{Event, EventBuffer, FaultKind, FeatureFlags, ReadWrite, RegisterMode, UffdBuilder};

use super::{mapping::Mapping, memfd::SealedMemory};

/// Why the faults of a process cannot be handed to the pager.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel gives this process no userfaultfd.
    #[error("userfaultfd is not available: {0}; allow access to /dev/userfaultfd, or load templates eagerly")]
    Create(io::Error),
    /// The mapping is not of a kind that can be paged in.
    #[error("cannot watch {len} bytes of guest memory for missing pages: {source}; load templates eagerly")]
    Register {
        /// Length of the mapping.
        len: usize,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Whose faults a userfaultfd has to deliver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Of user code only, or none at all; any user may have one.
    User,
    /// Also those the kernel takes on behalf of the process. KVM's are of this kind. Needs access to
    /// `/dev/userfaultfd`, CAP_SYS_PTRACE or `vm.unprivileged_userfaultfd=1`.
    UserAndKernel,
}

/// A userfaultfd; non-blocking, closed on exec.
#[derive(Debug)]
pub struct Uffd(userfaultfd::Uffd);

/// A thread waits for memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Host-virtual address in the faulting process.
    pub address: u64,
    /// Whether the access was a write.
    pub write: bool,
    /// Whether the page exists and only its mapping is missing.
    pub minor: bool,
}

/// Room for the events of one read.
pub struct FaultBuffer(EventBuffer);

impl FaultBuffer {
    /// Room for `count` events.
    pub fn new(count: usize) -> Self {
        Self(EventBuffer::new(count))
    }
}

impl Uffd {
    /// A new one for this process: from `/dev/userfaultfd` where that may be opened, else by the system call.
    pub fn new(scope: Scope) -> io::Result<Self> {
        Self::with_features(scope, FeatureFlags::MISSING_SHMEM)
    }

    fn with_features(scope: Scope, features: FeatureFlags) -> io::Result<Self> {
        let built = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(scope == Scope::User)
            .require_features(features)
            .create();
        match built {
            // The device is there but not for us; the system call has rules of its own.
            Err(userfaultfd::Error::OpenDevUserfaultfd(_)) => Self::by_system_call(scope, features),
            result => Ok(Self(result.map_err(io_error)?)),
        }
    }

    fn by_system_call(scope: Scope, features: FeatureFlags) -> io::Result<Self> {
        let mut flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        if scope == Scope::User {
            flags |= UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
        }
        // SAFETY: the call makes a descriptor and touches no memory.
        let fd = unsafe { rustix::mm::userfaultfd(flags) }?;
        let mut handshake = ApiHandshake { api: API, features: features.bits(), ioctls: 0 };
        // SAFETY: opcode and structure are those of UFFDIO_API (linux/userfaultfd.h).
        let request = unsafe { Updater::<UFFDIO_API, ApiHandshake>::new(&mut handshake) };
        // SAFETY: the kernel reads and writes `handshake` only.
        unsafe { ioctl(&fd, request) }?;
        Ok(Self::adopt(fd))
    }

    /// One that delivers all faults on missing pages of a private mapping of an image. The fork keeps it open for
    /// life: when the last descriptor is closed, the kernel lets waiting threads go on with zeros instead of memory.
    pub fn for_missing(mapping: &Mapping) -> Result<Self, Error> {
        let uffd = Self::new(Scope::UserAndKernel).map_err(Error::Create)?;
        uffd.register_missing(mapping.address(), mapping.len() as u64)
            .map_err(|source| Error::Register { len: mapping.len(), source })?;
        Ok(uffd)
    }

    /// One that delivers every fault on what this process has not mapped of a private mapping of an image: *minor* ones, of pages that
    /// the image has in memory, and those of its holes (MINOR_SHMEM, Linux 5.14). The kernel's fault-around is off as long.
    pub fn for_unmapped(mapping: &Mapping) -> Result<Self, Error> {
        let features = FeatureFlags::MISSING_SHMEM | FeatureFlags::from_bits_retain(MINOR_SHMEM);
        let uffd = Self::with_features(Scope::UserAndKernel, features).map_err(Error::Create)?;
        let (address, len) = (mapping.address() as *mut _, mapping.len());
        let registered = uffd.0.register_with_mode(address, len, RegisterMode::MISSING | RegisterMode::MINOR);
        registered.map_err(|error| Error::Register { len, source: io_error(error) })?;
        Ok(uffd)
    }

    /// As long as it is open, a fault on this mapping of an image brings in the page that was touched and not its neighbours,
    /// so that its page tables tell what was used. No fault is ever delivered: the mapping is registered for write protection,
    /// which switches off the kernel's fault-around (uffd_disable_fault_around() of linux/userfaultfd_k.h, Linux 5.19
    /// for shared memory), and nothing in it is protected.
    pub fn without_fault_around(mapping: &Mapping) -> Result<Self, Error> {
        let built = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(true)
            .require_features(FeatureFlags::from_bits_retain(WP_SHMEM))
            .create();
        let uffd = Self(built.map_err(io_error).map_err(Error::Create)?);
        let (address, len) = (mapping.address() as *mut _, mapping.len());
        let registered =
            uffd.0.register_with_mode(address, len, RegisterMode::from_bits_retain(WRITE_PROTECT));
        registered.map_err(|error| Error::Register { len, source: io_error(error) })?;
        Ok(uffd)
    }

    /// One made by another process for its own memory. Anything that is no userfaultfd is refused, so that a hostile
    /// sender cannot make the receiver read from something else.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let target = rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new())?;
        if target.as_bytes() != b"anon_inode:[userfaultfd]" {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "descriptor is not a userfaultfd"));
        }
        // A blocking one cannot be polled (userfaultfd(2)).
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        Ok(Self::adopt(fd))
    }

    fn adopt(fd: OwnedFd) -> Self {
        // SAFETY: the descriptor is owned and passes to the new owner.
        Self(unsafe { userfaultfd::Uffd::from_raw_fd(fd.into_raw_fd()) })
    }

    /// From now on accesses to missing pages of `[address, address + len)` in this process wait for someone to
    /// resolve them. The range is a private or shared mapping of a memfd, page aligned.
    pub fn register_missing(&self, address: u64, len: u64) -> io::Result<()> {
        self.0.register(address as *mut _, len as usize).map(drop).map_err(io_error)
    }

    /// Leaves the faults on `[address, address + len)` to the kernel again and wakes who waits for one: they go on with what the mapped file
    /// has. To be done before the last descriptor of a userfaultfd is closed, if anybody may touch the memory meanwhile: before
    /// Linux 6.15 ("mm/userfaultfd: fix release hang over concurrent GUP") a fault of KVM's that meets the closing is repeated without end, by a thread
    /// that holds the lock which the closing waits for.
    ///
    /// # Errors
    /// EINVAL when it was not registered; ENOMEM, also when the process is gone.
    pub fn unregister(&self, address: u64, len: u64) -> io::Result<()> {
        self.0.unregister(address as *mut _, len as usize).map_err(io_error)
    }

    /// Appends the faults that wait to be read; none is not an error.
    pub fn read_faults(&self, buffer: &mut FaultBuffer, faults: &mut Vec<Fault>) -> io::Result<()> {
        for event in self.0.read_events(&mut buffer.0).map_err(io_error)? {
            match event.map_err(io_error)? {
                Event::Pagefault { kind, rw, addr } => faults.push(Fault {
                    address: addr as u64,
                    write: rw == ReadWrite::Write,
                    minor: kind == FaultKind::Minor,
                }),
                // Only with features that are not asked for.
                event => return Err(io::Error::other(format!("unexpected userfaultfd event {event:?}"))),
            }
        }
        Ok(())
    }

    /// Lets the threads go on that wait for a page in `[address, address + len)`.
    pub fn wake(&self, address: u64, len: u64) -> io::Result<()> {
        self.0.wake(address as *mut _, len as usize).map_err(io_error)
    }

    /// Puts new pages of the process's own at `to`, where nothing is mapped, and wakes who waits for them: each appears with all of its
    /// contents. Returns how many bytes that were, which may be fewer.
    ///
    /// # Errors
    /// EEXIST when the first page is mapped already, EAGAIN while the address space is changing, ENOMEM.
    pub fn copy(&self, to: u64, pages: &[u8]) -> io::Result<usize> {
        // SAFETY: only unmapped pages of ranges registered with this descriptor change, from unmapped to these contents; whoever
        // registered them asked for that. The source is a live slice.
        let copied = unsafe { self.0.copy(pages.as_ptr().cast(), to as *mut _, pages.len(), true) };
        match copied {
            // The library hands on the kernel's count as it is, which is a negated error when nothing was copied.
            Err(userfaultfd::Error::PartiallyCopied(count)) if (1..=pages.len()).contains(&count) => {
                Ok(count)
            }
            Err(userfaultfd::Error::PartiallyCopied(_)) => Err(io::Error::from_raw_os_error(libc::EAGAIN)),
            result => result.map_err(io_error),
        }
    }

    /// Maps the pages that the mapped file has in memory in `[address, address + len)`, as far as nothing is mapped there, and wakes who
    /// waits for them. Stops at the first page that is mapped already or not in memory; that is no error unless it is the first.
    ///
    /// # Errors
    /// EEXIST when the first page is mapped already, EAGAIN while the address space is changing, ENOMEM.
    pub fn map(&self, address: u64, len: u64) -> io::Result<()> {
        self.0.r#continue(address as *mut _, len as usize, true).map(drop).map_err(io_error)
    }

    /// Maps the kernel's page of zeros wherever nothing is mapped in `[address, address + len)` and wakes who waits
    /// there. In a private mapping of shared memory this takes no page: neither the process nor the memory behind it
    /// gets one before it is written (mfill_atomic_pte() of mm/userfaultfd.c). Returns the number of pages that were
    /// mapped already.
    pub fn zero(&self, address: u64, len: u64) -> io::Result<u64> {
        match self.map_zeros(address, len) {
            // The count of a part is lost (UFFDIO_ZEROPAGE, ioctl_userfaultfd(2)); page by page nothing is.
            Err(error) if is_partial(&error) => {}
            result => return result.map(|()| 0),
        }
        let (mut at, mut existing) = (address, 0);
        while at < address + len {
            match self.map_zeros(at, PAGE as u64) {
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                    std::thread::yield_now();
                    continue;
                }
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => existing += 1,
                result => result?,
            }
            at += PAGE as u64;
        }
        // Who waits for a page that exists has missed its wake-up.
        if existing > 0 {
            self.wake(address, len)?;
        }
        Ok(existing)
    }

    fn map_zeros(&self, address: u64, len: u64) -> io::Result<()> {
        // SAFETY: only unmapped pages of ranges registered with this descriptor change, from unmapped to zeros; whoever
        // registered them asked for that and waits for it.
        unsafe { self.0.zeropage(address as *mut _, len as usize, true) }.map(drop).map_err(io_error)
    }

    /// To send it to the pager.
    pub fn into_fd(self) -> OwnedFd {
        // The library's own `into_raw_fd` (0.9.0) closes the descriptor it returns.
        let kept = ManuallyDrop::new(self.0);
        // SAFETY: the descriptor is open, and its former owner will not close it.
        unsafe { OwnedFd::from_raw_fd(kept.as_raw_fd()) }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Inserts pages into a [`SealedMemory`] so that no other process ever sees one half filled, and so that exactly the
/// inserted pages appear, whatever page size the kernel would like.
#[derive(Debug)]
pub struct Inserter {
    memory: SealedMemory,
    uffd: Uffd,
}

impl Inserter {
    /// Takes over the memory; gives it back when this kernel offers no userfaultfd.
    pub fn new(memory: SealedMemory) -> Result<Self, (SealedMemory, io::Error)> {
        let registered = Uffd::new(Scope::User).and_then(|uffd| {
            uffd.register_missing(memory.address_of(0, 0), memory.len())?;
            Ok(uffd)
        });
        match registered {
            Ok(uffd) => Ok(Self { memory, uffd }),
            Err(error) => Err((memory, error)),
        }
    }

    /// The memory that is filled.
    pub fn memory(&self) -> &SealedMemory {
        &self.memory
    }

    /// Inserts whole pages at `offset`. Pages that exist already are overwritten in place with the same range of
    /// `pages`; their number is returned.
    ///
    /// # Panics
    /// When the range is not inside.
    pub fn insert(&self, offset: u64, pages: &[u8]) -> io::Result<usize> {
        let to = self.memory.address_of(offset, pages.len());
        let (mut done, mut existing) = (0, 0);
        while done < pages.len() {
            let rest = &pages[done..];
            match self.uffd.copy(to + done as u64, rest) {
                Ok(count) => done += count,
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                    let page = &rest[..PAGE.min(rest.len())];
                    self.memory.write(offset + done as u64, page);
                    existing += 1;
                    done += page.len();
                }
                // The address space was changing; try again (ioctl_userfaultfd(2), UFFDIO_COPY).
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
                Err(error) => return Err(error),
            }
        }
        Ok(existing)
    }
}

/// Whether a request over several pages was carried out in part at most.
fn is_partial(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EEXIST))
}

/// The unit of insertion, in bytes.
const PAGE: usize = 4096;

/// UFFD_USER_MODE_ONLY of linux/userfaultfd.h.
const USER_MODE_ONLY: u32 = 1;

/// UFFD_FEATURE_MINOR_SHMEM of linux/userfaultfd.h.
const MINOR_SHMEM: u64 = 1 << 10;

/// UFFD_FEATURE_WP_HUGETLBFS_SHMEM of linux/userfaultfd.h.
const WP_SHMEM: u64 = 1 << 12;

/// UFFDIO_REGISTER_MODE_WP of linux/userfaultfd.h.
const WRITE_PROTECT: u64 = 1 << 1;

/// UFFD_API of linux/userfaultfd.h.
const API: u64 = 0xAA;

/// UFFDIO_API of linux/userfaultfd.h.
const UFFDIO_API: Opcode = opcode::read_write::<ApiHandshake>(0xAA, 0x3F);

/// struct uffdio_api of linux/userfaultfd.h.
#[repr(C)]
struct ApiHandshake {
    api: u64,
    features: u64,
    ioctls: u64,
}

fn io_error(error: userfaultfd::Error) -> io::Error {
    match error {
        userfaultfd::Error::CopyFailed(errno)
        | userfaultfd::Error::SystemError(errno)
        | userfaultfd::Error::ZeropageFailed(errno) => io::Error::from_raw_os_error(errno as i32),
        userfaultfd::Error::OpenDevUserfaultfd(error) => error,
        userfaultfd::Error::ReadEof => io::ErrorKind::UnexpectedEof.into(),
        error => io::Error::other(error),
    }
}

#[cfg(test)]
mod tests;
