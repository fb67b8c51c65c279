//! `forkling pool`: shows and sets how many parked forks a template has.

use std::process::ExitCode;

use clap::ValueEnum;

use super::{
    client::{Client, Failure, segment},
    output::Output,
};
use crate::api::types::{self, PoolInfo, PoolSettings};

/// See [`types::Rehearsal`].
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Rehearsal {
    /// Nothing
    Off,
    /// The way to the acknowledgement
    Acknowledge,
    /// The same and a command that does nothing
    Command,
}

impl From<Rehearsal> for types::Rehearsal {
    fn from(rehearsal: Rehearsal) -> Self {
        match rehearsal {
            Rehearsal::Off => Self::Off,
            Rehearsal::Acknowledge => Self::Acknowledge,
            Rehearsal::Command => Self::Command,
        }
    }
}

/// A pool.
#[derive(Debug, clap::Args)]
pub struct Pool {
    /// The template
    name: String,
    /// Parked forks at rest
    #[arg(long, value_name = "N")]
    low: Option<u32>,
    /// Most parked forks, at least --low; 0 ends the pool
    #[arg(long, value_name = "N")]
    high: Option<u32>,
    /// What a fork runs before it is parked
    #[arg(long)]
    rehearsal: Option<Rehearsal>,
    /// Whether parked forks hold the pages and page tables that their first use needs; if not, they run nothing before and take the least memory
    #[arg(long, value_name = "BOOL")]
    keep_writes: Option<bool>,
    /// Whether pages that forks read first are mapped ahead, where the host has KVM_PRE_FAULT_MEMORY
    #[arg(long, value_name = "BOOL")]
    pre_fault: Option<bool>,
}

impl Pool {
    /// Runs it.
    pub async fn run(self, client: &Client, output: Output) -> Result<ExitCode, Failure> {
        let path = format!("/v1/templates/{}/pool", segment(&self.name));
        let mut info: PoolInfo = client.get(&path).await?;
        if let Some(settings) = self.settings(&info) {
            info = client.put(&path, &settings).await?;
        }
        if output.json {
            output.print(&info);
        } else {
            lines(&info).iter().for_each(|(name, value)| println!("{name:<10}{value}"));
        }
        Ok(ExitCode::SUCCESS)
    }

    /// What is to be set, if anything; what is not given stays. One watermark moves the other where it must.
    fn settings(&self, now: &PoolInfo) -> Option<PoolSettings> {
        let given = self.low.is_some() || self.high.is_some();
        let techniques = self.rehearsal.is_some() || self.keep_writes.is_some() || self.pre_fault.is_some();
        if !given && !techniques {
            return None;
        }
        let (low, high) = match (self.low, self.high) {
            (Some(low), Some(high)) => (low, high),
            (Some(low), None) => (low, now.high.max(low)),
            (None, Some(high)) => (now.low.min(high), high),
            (None, None) => (now.low, now.high),
        };
        // A template without a pool has no settings yet, so the API's defaults are meant.
        let kept = if now.high == 0 { PoolSettings::default() } else { settings_of(now) };
        Some(PoolSettings {
            low,
            high,
            rehearsal: self.rehearsal.map_or(kept.rehearsal, Into::into),
            keep_writes: self.keep_writes.unwrap_or(kept.keep_writes),
            pre_fault: self.pre_fault.unwrap_or(kept.pre_fault),
        })
    }
}

fn settings_of(info: &PoolInfo) -> PoolSettings {
    let PoolInfo { low, high, rehearsal, keep_writes, pre_fault, .. } = *info;
    PoolSettings { low, high, rehearsal, keep_writes, pre_fault }
}

/// A pool in words, for people.
pub fn lines(info: &PoolInfo) -> Vec<(&'static str, String)> {
    if info.high == 0 {
        return vec![("pool", "none".to_owned())];
    }
    let rehearsal = match info.rehearsal {
        types::Rehearsal::Off => "off",
        types::Rehearsal::Acknowledge => "acknowledge",
        types::Rehearsal::Command => "command",
    };
    let kept = if info.keep_writes { "writes kept" } else { "bare" };
    let (parked, building) = (info.parked, info.building);
    vec![
        ("pool", format!("{} at rest, at most {}, {} wanted now", info.low, info.high, info.target)),
        ("parked", format!("{parked}, {building} being made, {:.1} ms each", info.refill_ms)),
        ("rehearsal", format!("{rehearsal}, {kept}")),
        ("requests", format!("{} served from it, {} found it empty", info.hits, info.misses)),
        ("died", info.died.to_string()),
    ]
}

#[cfg(test)]
mod tests;
