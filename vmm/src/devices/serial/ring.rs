//! The last bytes a guest printed.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// Bytes the ring keeps.
pub const CAPACITY: usize = 64 * 1024;

/// A bounded log with a running count. It grows with its content, so an idle guest's ring costs nothing.
#[derive(Debug)]
pub struct Ring {
    bytes: VecDeque<u8>,
    total: u64,
    /// The reader was woken and has not read to the end since.
    woken: bool,
    waker: Option<Arc<mio::Waker>>,
}

impl Ring {
    /// An empty ring.
    pub fn new(waker: Option<Arc<mio::Waker>>) -> Self {
        Self { bytes: VecDeque::new(), total: 0, woken: false, waker }
    }

    /// An empty ring with the same reader, for whom the numbers of bytes go on.
    pub fn successor(&self) -> Self {
        Self { bytes: VecDeque::new(), total: self.total, woken: false, waker: self.waker.clone() }
    }

    /// At most `max` bytes from byte number `from` (counted from the first ever printed, 0), or from the oldest
    /// kept one, and the numbers they have. The end of the range is the `from` of the next call; if it is not the
    /// last byte's, the reader is woken again.
    pub fn read(&mut self, from: u64, max: usize) -> (Range<u64>, Vec<u8>) {
        let oldest = self.total - self.bytes.len() as u64;
        let start = from.clamp(oldest, self.total);
        let end = self.total.min(start.saturating_add(max as u64));
        self.woken = end < self.total;
        if self.woken {
            self.wake();
        }
        let range = (start - oldest) as usize..(end - oldest) as usize;
        (start..end, self.bytes.range(range).copied().collect())
    }

    fn wake(&self) {
        if let Some(waker) = &self.waker {
            // An eventfd write, which fails only when the loop has a wake-up to handle already.
            let _ = waker.wake();
        }
    }
}

impl io::Write for Ring {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.total += data.len() as u64;
        let kept = &data[data.len().saturating_sub(CAPACITY)..];
        let overflow = (self.bytes.len() + kept.len()).saturating_sub(CAPACITY);
        self.bytes.drain(..overflow);
        self.bytes.extend(kept);
        if !std::mem::replace(&mut self.woken, true) {
            self.wake();
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
