//! A fork as the pager's thread sees it.

use std::collections::HashMap;
use std::sync::Arc;

use forkling_vmm::memory::layout::PAGE;
use forkling_vmm::snapshot::CHUNK;
use forkling_vmm::sys::uffd::{Fault, Uffd};
use rustix::io::Errno;

use super::{Backing, Error, ForkId};

/// Times a thread may come back for one page that is in memory. More than a few mean that its mapping is of another
/// image, and it would come back for ever.
const MOST_REPEATS: u32 = 1000;

/// Pages watched for repeats; more are begun anew.
const WATCHED: usize = 256;

/// A fork the pager serves.
pub(super) struct Served {
    pub id: ForkId,
    pub backing: Arc<Backing>,
    pub uffd: Uffd,
    base: u64,
    /// How often threads came for pages that were in memory.
    repeats: HashMap<u64, u32>,
    /// Given up: left waiting until it is removed.
    pub failed: bool,
    /// Has its turn to come.
    pub queued: bool,
}

impl Served {
    pub fn new(id: ForkId, backing: Arc<Backing>, uffd: Uffd, base: u64) -> Self {
        Self { id, backing, uffd, base, repeats: HashMap::new(), failed: false, queued: false }
    }

    /// The page a fault is in.
    pub fn page_of(&self, fault: &Fault) -> Result<u64, Error> {
        let address = fault.address;
        let offset = address.checked_sub(self.base).filter(|&offset| offset < self.backing.image().len());
        offset.map(|offset| offset / PAGE).ok_or(Error::Address { address })
    }

    /// Notes a fault on memory that is there: its chunk came while the thread was on its way, or it never helps.
    pub fn note_late(&mut self, fault: &Fault) -> Result<(), Error> {
        if self.repeats.len() >= WATCHED {
            self.repeats.clear();
        }
        let repeats = self.repeats.entry(fault.address).or_default();
        *repeats += 1;
        if *repeats > MOST_REPEATS { Err(Error::Repeated { address: fault.address }) } else { Ok(()) }
    }

    /// Lets all threads of the fork go on that wait for a page in one of the runs, each a first page and a number.
    pub fn wake(&self, runs: &[(u64, u64)]) -> Result<(), Error> {
        let wake = |&(first, count): &(u64, u64)| self.uffd.wake(self.base + first * PAGE, count * PAGE);
        runs.iter().try_for_each(wake).map_err(Error::Faults)
    }

    /// Leaves the faults of a fork that is dead to the kernel: KVM may still be at one ([`Uffd::unregister`]).
    pub fn let_go(&self) {
        // Refused when its memory is gone, too.
        let _ = self.uffd.unregister(self.base, self.backing.image().len());
    }

    /// Maps the page of zeros all over the chunk of a page, which is all zeros: neither the image nor the fork takes a page
    /// for it.
    pub fn show_zeros(&mut self, page: u64, fault: &Fault) -> Result<(), Error> {
        let start = self.base + page * PAGE / CHUNK as u64 * CHUNK as u64;
        match self.uffd.zero(start, CHUNK as u64) {
            Ok(0) => Ok(()),
            Ok(_) => self.note_late(fault),
            // It is dying, and nobody waits any more.
            Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => Ok(()),
            Err(error) => Err(Error::Faults(error)),
        }
    }
}
