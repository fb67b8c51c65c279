//! The memory the host writes identity into.

use std::io;
use std::ptr::{self, NonNull};
use std::slice;

use forkling_proto::mailbox::{self, SIZE};
use rustix::mm::{MapFlags, ProtFlags};

/// A page-aligned, resident buffer of [`SIZE`] bytes that never moves and lives as long as the agent.
#[derive(Debug)]
pub struct Mailbox {
    start: NonNull<u8>,
}

impl Mailbox {
    /// Maps, populates and locks the buffer, so that the host finds every page in the guest's page tables.
    pub fn new() -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::POPULATE;
        // SAFETY: a new anonymous mapping at an address the kernel chooses aliases nothing.
        let start = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), SIZE, protection, flags) }?;
        // SAFETY: the range is the mapping made above.
        unsafe { rustix::mm::mlock(start, SIZE) }?;
        let start = NonNull::new(start.cast()).expect("mmap returns no null pointer");
        let mut mailbox = Self { start };
        // A page that was only read is the shared zero page; after a write it is this buffer's own.
        mailbox.bytes_mut().fill(0xff);
        mailbox.clear();
        Ok(mailbox)
    }

    /// Its guest-virtual address.
    pub fn address(&self) -> u64 {
        self.start.as_ptr().expose_provenance() as u64
    }

    /// Its size in bytes.
    pub fn len(&self) -> usize {
        SIZE
    }

    /// What is in it.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `start` points to SIZE initialised bytes that stay mapped; the host writes them only inside
        // `Port::forkpoint`, which borrows the mailbox exclusively.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), SIZE) }
    }

    /// Zeroes it, so that entropy does not stay behind and an unfilled mailbox is recognised.
    pub fn clear(&mut self) {
        self.bytes_mut().fill(0);
    }

    /// Zeroes what the host filled, without touching the pages behind it.
    pub fn clear_filled(&mut self) {
        let filled = mailbox::filled_len(self.bytes());
        self.bytes_mut()[..filled].fill(0);
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; the exclusive borrow of `self` makes this the only reference.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), SIZE) }
    }
}
