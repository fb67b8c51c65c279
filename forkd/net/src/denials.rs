//! What a guest was denied: the latest, numbered.

use std::{
    collections::VecDeque,
    net::IpAddr,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use crate::{
    bucket::Bucket,
    control::{Denial, MAX_DENIALS},
};

/// Denials logged in a second for each link.
const LOGGED: u64 = 10;

/// The list.
#[derive(Debug)]
pub struct Denials {
    kept: VecDeque<Denial>,
    next: u64,
    log: Bucket,
}

impl Denials {
    /// An empty one.
    pub fn new(now: Instant) -> Self {
        Self { kept: VecDeque::new(), next: 0, log: Bucket::new(LOGGED, now) }
    }

    /// Adds one, and logs it for the fork `id`.
    pub fn add(
        &mut self,
        id: &str,
        what: String,
        name: Option<String>,
        address: Option<IpAddr>,
        port: Option<u16>,
    ) {
        if self.log.one(Instant::now()) {
            tracing::info!(fork = id, what, name, ?address, port, "denied");
        }
        if self.kept.len() == MAX_DENIALS {
            self.kept.pop_front();
        }
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let at_unix_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        self.kept.push_back(Denial { number: self.next, at_unix_ms, what, name, address, port });
        self.next += 1;
    }

    /// Number of the next.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Those with this number and later.
    pub fn from(&self, number: u64) -> Vec<Denial> {
        self.kept.iter().filter(|denial| denial.number >= number).cloned().collect()
    }
}
