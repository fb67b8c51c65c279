//! Token buckets.

use std::time::{Duration, Instant};

/// A rate with a burst of one second. What exceeds it by one packet is let through and paid for afterwards.
#[derive(Debug)]
pub struct Bucket {
    rate: u64,
    level: i64,
    filled: Instant,
}

impl Bucket {
    /// A full one; `rate` is units a second, 0 for no limit.
    pub fn new(rate: u64, now: Instant) -> Self {
        let rate = rate.min(i64::MAX as u64 / 4);
        Self { rate, level: rate as i64, filled: now }
    }

    /// Whether something may pass now.
    pub fn open(&mut self, now: Instant) -> bool {
        if self.rate == 0 {
            return true;
        }
        let gained =
            now.saturating_duration_since(self.filled).as_nanos() * u128::from(self.rate) / 1_000_000_000;
        if gained > 0 {
            let level = (i128::from(self.level) + gained as i128).min(i128::from(self.rate));
            self.level = level as i64;
            self.filled = now;
        }
        self.level > 0
    }

    /// Counts `units` that passed.
    pub fn take(&mut self, units: u64) {
        if self.rate > 0 {
            self.level = self.level.saturating_sub_unsigned(units);
        }
    }

    /// [`Bucket::open`], then [`Bucket::take`] of one.
    pub fn one(&mut self, now: Instant) -> bool {
        let open = self.open(now);
        if open {
            self.take(1);
        }
        open
    }

    /// How long a bucket that is not open stays so, at least a millisecond.
    pub fn wait(&self) -> Duration {
        let missing = self.level.min(0).unsigned_abs() + 1;
        Duration::from_millis((missing.saturating_mul(1000) / self.rate.max(1)).clamp(1, 10_000))
    }
}

#[cfg(test)]
mod tests;
