//! Pages of a running guest that are folded: thrown away, and rebuilt when somebody touches them.
//!
//! While there are such pages the whole memory is registered with a userfaultfd, so that each access to what is not mapped waits for
//! whoever holds [`Folded`]: the event loop's thread ([`crate::machine::EventLoop`]). Rebuilt pages go in by UFFDIO_COPY,
//! which makes them the process's own in a private mapping of a memfd, all others by UFFDIO_CONTINUE, which maps the image's, read-only
//! (mfill_atomic_pte() and mfill_atomic_install_pte() of mm/userfaultfd.c, the same in Linux 5.14 to 6.18). A page that is mapped
//! is never asked for again, so each is brought back once.
//!
//! Its holder must not touch the guest's memory, because it would wait for itself. Nor may it wait for a lock whose holders do: a
//! vCPU's thread reads guest memory with a device locked. All that [`Folded`] does takes no lock and reads the image by its descriptor.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    os::unix::fs::FileExt,
};

use memmap2::MmapMut;

use super::{fold::Folds, layout::PAGE};
use crate::sys::{
    mapping::Mapping,
    uffd::{self, Fault, FaultBuffer, Uffd},
};

/// Most pages that are rebuilt for one call.
const BATCH: usize = 8;

/// Pages that come with one that is not folded, at most, as with the kernel's own fault-around.
const AROUND: u64 = 16;

/// Faults after which the guest is not at rest: each takes ten times as long as the kernel's own.
const MOST_FAULTS: usize = 256;

/// Faults read at a time.
const FAULTS: usize = 8;

/// Whether a guest's pages stay folded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// They may.
    Goes,
    /// It is over: nothing is left to wait for, or the guest touches too much.
    Over,
}

/// The folded pages of a guest, and the userfaultfd without which its memory would show the image's bytes in their place. That is closed
/// with no page left, after [`Folded::unfold`]; if this is dropped earlier it stays open for as long as the process lives: who touches
/// such a page then waits for ever, and never sees what was not there.
#[derive(Debug)]
pub struct Folded {
    mapping: Mapping,
    image: File,
    folds: Folds,
    /// `None` once this is dropped.
    faults: Option<Uffd>,
    /// Faults that were served.
    served: usize,
}

impl Folded {
    /// Without a page yet, with room for so many. From here on nobody but its holder resolves the mapping's faults.
    ///
    /// # Errors
    /// [`uffd::Error`] where the kernel is older than 5.14 or grants no userfaultfd for its own faults; ENOMEM, EMFILE.
    pub fn new(mapping: Mapping, image: &File, pages: usize) -> io::Result<Self> {
        let (image, folds) = (image.try_clone()?, Folds::with_room(pages)?);
        let faults = Uffd::for_unmapped(&mapping).map_err(|error: uffd::Error| io::Error::other(error))?;
        Ok(Self { mapping, image, folds, faults: Some(faults), served: 0 })
    }

    /// Where to add pages, which are discarded afterwards and before anybody else touches them.
    pub fn folds(&mut self) -> &mut Folds {
        &mut self.folds
    }

    /// How many pages are folded.
    pub fn len(&self) -> usize {
        self.folds.len()
    }

    /// Whether none are.
    pub fn is_empty(&self) -> bool {
        self.folds.is_empty()
    }

    /// Readable when somebody waits for a page.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.faults().as_fd()
    }

    /// Brings back what is waited for.
    ///
    /// # Errors
    /// When a page cannot be had: no memory is left. The guest cannot go on.
    pub fn serve(&mut self) -> io::Result<Rest> {
        let (mut buffer, mut faults) = (FaultBuffer::new(FAULTS), Vec::new());
        loop {
            self.faults().read_faults(&mut buffer, &mut faults)?;
            if faults.is_empty() {
                let over = self.folds.is_empty() || self.served > MOST_FAULTS;
                return Ok(if over { Rest::Over } else { Rest::Goes });
            }
            self.served += faults.len();
            faults.drain(..).try_for_each(|fault| self.resolve(fault))?;
        }
    }

    /// Brings all pages back, wakes who waits, and leaves the memory to the kernel again.
    ///
    /// # Errors
    /// As [`Folded::serve`].
    pub fn unfold(mut self) -> io::Result<()> {
        if !self.folds.is_empty() {
            let mut room = MmapMut::map_anon(BATCH * PAGE as usize)?;
            let mut at = 0;
            while let Some(page) = self.folds.page(at) {
                let follow = (1..BATCH).take_while(|&n| self.folds.page(at + n) == Some(page + n as u64));
                let count = 1 + follow.count();
                self.bring_back(at, &mut room[..count * PAGE as usize])?;
                at += count;
            }
            self.folds.forget(0..at);
        }
        Ok(())
    }

    fn resolve(&mut self, fault: Fault) -> io::Result<()> {
        let page = (fault.address - self.mapping.address()) / PAGE;
        match self.folds.find(page) {
            Ok(index) => {
                self.bring_back(index, &mut [0; PAGE as usize])?;
                self.folds.forget(index..index + 1);
                Ok(())
            }
            // A hole is zeros, and stays one.
            Err(_) if !fault.minor => self.faults().zero(self.address(page), PAGE).map(drop),
            Err(next) => {
                let around = (page / AROUND + 1) * AROUND;
                let end = self.folds.page(next).map_or(around, |folded| folded.min(around));
                self.map(page, end.min(self.mapping.len() as u64 / PAGE))
            }
        }
    }

    /// Puts the pages from `index` on, which follow each other in the memory too, where they belong. `room` is for their bytes.
    fn bring_back(&self, index: usize, room: &mut [u8]) -> io::Result<()> {
        let page = self.folds.page(index).expect("it was found");
        self.image.read_exact_at(room, page * PAGE)?;
        for (bytes, index) in room.chunks_exact_mut(PAGE as usize).zip(index..) {
            self.folds.unfold(index, bytes);
        }
        let mut done = 0;
        while done < room.len() {
            done += patiently(|| self.faults().copy(self.address(page) + done as u64, &room[done..]))?;
        }
        Ok(())
    }

    /// Maps the image's pages from `page`, which it has in memory, up to `end`.
    fn map(&self, page: u64, end: u64) -> io::Result<()> {
        let address = self.address(page);
        match patiently(|| self.faults().map(address, (end - page) * PAGE)) {
            // Two threads waited for it, or it has come along with another one.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => self.faults().wake(address, PAGE),
            result => result,
        }
    }

    fn address(&self, page: u64) -> u64 {
        self.mapping.address() + page * PAGE
    }

    fn faults(&self) -> &Uffd {
        self.faults.as_ref().expect("it is there until this is dropped")
    }
}

impl Drop for Folded {
    fn drop(&mut self) {
        let Some(faults) = self.faults.take() else { return };
        if !self.folds.is_empty() {
            return std::mem::forget(faults);
        }
        // Should that be refused, closing it still wakes who waits.
        let _ = faults.unregister(self.mapping.address(), self.mapping.len() as u64);
    }
}

/// Tries again as long as the address space is changing.
fn patiently<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests;
