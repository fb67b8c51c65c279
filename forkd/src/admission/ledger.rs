//! What there is, less what was granted.

use std::time::Duration;

use super::host::{Limit, OWN_TASKS, Room};

/// Shortest and longest time in seconds after which a caller is asked to come back.
const AFTER: (u32, u32) = (1, 60);

/// The same when nothing is known of how fast room is made.
const UNKNOWN: u32 = 5;

/// What one child takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Need {
    /// Bytes.
    pub memory: u64,
    /// Processes and threads.
    pub tasks: u64,
    /// Whether it has to be made; one out of the pool has not.
    pub cold: bool,
}

/// How fast forks come and go, a second.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rates {
    made: f64,
    ended: f64,
}

impl Rates {
    /// Seconds until so many have been made.
    pub fn until_made(&self, count: u64) -> u32 {
        after(count, self.made)
    }

    /// Seconds until so many have ended.
    pub fn until_ended(&self, count: u64) -> u32 {
        after(count, self.ended)
    }
}

fn after(count: u64, rate: f64) -> u32 {
    // Slower than one in a minute is no rate to count on.
    if rate < 1.0 / f64::from(AFTER.1) {
        return UNKNOWN;
    }
    ((count as f64 / rate).ceil() as u32).clamp(AFTER.0, AFTER.1)
}

/// Sums of needs.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    memory: u64,
    tasks: u64,
}

impl Sum {
    fn add(&mut self, need: &Need) {
        self.memory += need.memory;
        self.tasks += need.tasks;
    }

    fn subtract(&mut self, need: &Need) {
        // A look at the host may have come between.
        self.memory = self.memory.saturating_sub(need.memory);
        self.tasks = self.tasks.saturating_sub(need.tasks);
    }
}

/// See the module.
#[derive(Debug)]
pub struct Ledger {
    /// As last seen.
    pub room: Room,
    /// How fast room is made.
    pub rates: Rates,
    /// Promised to forks that lived then.
    promised: u64,
    /// Granted since, to forks made or not.
    granted: Sum,
    /// Granted to forks that are not made yet.
    pending: Sum,
    cold: u64,
    made: u64,
    ended: u64,
}

impl Ledger {
    /// Nothing granted.
    pub fn new(room: Room) -> Self {
        let (granted, pending) = Default::default();
        Self { room, rates: Rates::default(), promised: 0, granted, pending, cold: 0, made: 0, ended: 0 }
    }

    /// Grants a child what it needs, if it is there; `most` is how many may be under construction or wait for it.
    pub fn grant(&mut self, need: &Need, most: u64) -> Result<(), Limit> {
        let memory = self.room.available.saturating_sub(self.room.reserve + self.promised);
        if need.cold && self.cold >= most {
            return Err(Limit::Queue);
        }
        if self.granted.memory + need.memory > memory {
            return Err(Limit::Memory);
        }
        if self.granted.tasks + need.tasks > self.room.tasks {
            return Err(Limit::Processes);
        }
        self.granted.add(need);
        self.pending.add(need);
        self.cold += u64::from(need.cold);
        Ok(())
    }

    /// A child is made, or will not be.
    pub fn settle(&mut self, need: &Need, made: bool) {
        self.pending.subtract(need);
        self.cold -= u64::from(need.cold);
        if made {
            self.made += u64::from(need.cold);
        } else {
            self.granted.subtract(need);
        }
    }

    /// A new look: what was made before is in it. `own_tasks` are those of living forks, `ended` counts all forks that
    /// ever ended, `since` is the time since the last look.
    pub fn looked(&mut self, mut room: Room, promised: u64, own_tasks: u64, ended: u64, since: Duration) {
        let own = room.own_tasks.saturating_sub(own_tasks);
        if own < room.tasks {
            (room.tasks, room.bounds) = (own, OWN_TASKS);
        }
        (self.room, self.promised, self.granted) = (room, promised, self.pending);
        let seconds = since.as_secs_f64().max(0.001);
        // Halved with each look; an idle second is no evidence of slow construction.
        let mix = |rate: &mut f64, count: u64| *rate += (count as f64 / seconds - *rate) / 2.0;
        if self.cold > 0 || self.made > 0 {
            mix(&mut self.rates.made, self.made);
        }
        mix(&mut self.rates.ended, ended - self.ended);
        (self.made, self.ended) = (0, ended);
    }

    /// Children under construction or waiting for it.
    pub fn cold(&self) -> u64 {
        self.cold
    }

    /// Bytes promised to living forks and to those being made.
    pub fn promised(&self) -> u64 {
        self.promised + self.granted.memory
    }
}
