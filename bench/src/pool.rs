//! The pool of parked forks, through the API. A build without one answers 404 to its path.

use std::{thread, time::Duration};

use anyhow::{bail, ensure};
use serde_json::{Value, json};

use crate::{
    bench::{Bench, TEMPLATE},
    client::request,
};

/// How a pool is to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Parked forks below which it is refilled.
    pub low: u64,
    /// Parked forks to which it is refilled.
    pub high: u64,
    /// What a parked fork runs before it waits: `off`, `acknowledge` or `command`.
    pub rehearsal: &'static str,
    /// Whether pages that the rehearsal wrote stay in the fork.
    pub keep_writes: bool,
    /// Whether pages that forks read first are mapped ahead, where the host can do that.
    pub pre_fault: bool,
}

impl Pool {
    /// Always `depth` deep, with everything on.
    pub fn of(depth: u64) -> Self {
        Self { low: depth, high: depth, rehearsal: "command", keep_writes: true, pre_fault: true }
    }

    /// No pool.
    pub fn none() -> Self {
        Self::of(0)
    }
}

/// Times a state is asked for before the pool counts as stuck, and the time between.
const ATTEMPTS: u32 = 60_000;
const PAUSE: Duration = Duration::from_millis(2);

impl Bench {
    fn pool_path() -> String {
        format!("/v1/templates/{TEMPLATE}/pool")
    }

    /// State and settings of the pool; none if this build has no pools.
    pub fn get_pool(&mut self) -> anyhow::Result<Option<Value>> {
        let reply = self.connection.exchange(&request("GET", &Self::pool_path(), None))?;
        if reply.status == 404 {
            return Ok(None);
        }
        ensure!(reply.is_success(), "the pool cannot be read: {}", reply.text());
        Ok(Some(reply.json()?))
    }

    /// Changes the pool's settings.
    pub fn set_pool(&mut self, pool: Pool) -> anyhow::Result<()> {
        let Pool { low, high, rehearsal, keep_writes, pre_fault } = pool;
        let mut body = json!({"low": low, "high": high, "rehearsal": rehearsal, "keep_writes": keep_writes});
        // A build without it refuses to be told.
        if !pre_fault {
            body["pre_fault"] = false.into();
        }
        self.connection.call("PUT", &Self::pool_path(), Some(&body)).map(drop)
    }

    /// Waits until exactly `count` forks are parked and none is being made.
    pub fn wait_parked(&mut self, count: u64) -> anyhow::Result<()> {
        let mut last = Value::Null;
        for _ in 0..ATTEMPTS {
            last = self.get_pool()?.unwrap_or_default();
            let number = |name: &str| last[name].as_u64().unwrap_or_default();
            if number("parked") == count && number("building") == 0 {
                return Ok(());
            }
            thread::sleep(PAUSE);
        }
        bail!("{count} parked forks were expected, the pool is {last}")
    }

    /// Sets a pool and waits until it is full.
    pub fn fill_pool(&mut self, pool: Pool) -> anyhow::Result<()> {
        self.set_pool(pool)?;
        self.wait_parked(pool.high)?;
        self.quiet();
        Ok(())
    }

    /// Has exactly one parked fork. What takes its place is made after a pause that is longer than what is measured.
    pub fn hold_one(&mut self, pool: Pool) -> anyhow::Result<()> {
        self.fill_pool(Pool { low: 1, high: 1, ..pool })
    }

    /// Empties the pool, if this build has one, and waits until its memory is given back.
    pub fn drop_pool(&mut self) -> anyhow::Result<()> {
        if !self.pools {
            return Ok(());
        }
        self.fill_pool(Pool::none())?;
        self.settle()
    }
}
