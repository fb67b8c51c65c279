//! Putting a complete image together into pages of 2 MiB, a piece at a time.
//!
//! A fork's first touch of such a page fills one second-stage entry instead of 512. What it writes is copied by 4 KiB as
//! before.

use crate::{memory::guest::GuestMemory, sys::mapping::HUGE};

/// Share of a large page's small ones that must be in memory: the rest becomes pages of zeros that take memory.
const SHARE: usize = 2;

/// Small pages in a large one.
const PAGES: usize = HUGE / 4096;

/// How far the work is.
#[derive(Debug)]
pub struct LargePages {
    next: u64,
    end: u64,
    made: u64,
}

impl LargePages {
    /// All of `memory` to do.
    pub fn new(memory: &GuestMemory) -> Self {
        Self { next: 0, end: memory.bytes() / HUGE as u64 * HUGE as u64, made: 0 }
    }

    /// Does one piece, which takes a millisecond at most. False: that was the last one.
    pub fn step(&mut self, memory: &GuestMemory) -> bool {
        while self.next < self.end {
            let (mapping, at) = (memory.mapping(), self.next);
            self.next += HUGE as u64;
            match mapping.pages_in_memory(at, HUGE as u64) {
                Ok(pages) if pages * SHARE >= PAGES => {}
                _ => continue,
            }
            match mapping.collapse(at, HUGE as u64) {
                Ok(()) => self.made += 1,
                // A page that somebody holds, or no large page to be had: small ones work as well, if slower.
                Err(error) => tracing::trace!(at, %error, "no large page"),
            }
            return true;
        }
        tracing::debug!(made = self.made, "large pages made");
        false
    }
}
