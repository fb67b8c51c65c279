//! The last output of a guest's serial console.

use std::collections::VecDeque;

use crate::limits::CONSOLE_RING;

/// A bounded ring of bytes.
#[derive(Debug, Default)]
pub struct Console {
    ring: VecDeque<u8>,
    dropped: u64,
}

impl Console {
    /// Appends; the oldest bytes make room.
    pub fn push(&mut self, bytes: &[u8]) {
        self.ring.extend(bytes);
        let excess = self.ring.len().saturating_sub(CONSOLE_RING);
        self.ring.drain(..excess);
        self.dropped += excess as u64;
    }

    /// What is kept, and how many bytes were dropped before it.
    pub fn contents(&self) -> (Vec<u8>, u64) {
        (self.ring.iter().copied().collect(), self.dropped)
    }
}

#[cfg(test)]
mod tests;
