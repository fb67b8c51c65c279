//! Durations of a fork's phases from the instants its processes noted.

use forkling_vmm::protocol::Stamps;
use rustix::time::{ClockId, clock_gettime};

use crate::api::types::Timings;

/// CLOCK_MONOTONIC in nanoseconds, the clock of [`Stamps`].
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// Splits the time from `received` to `known` into phases that add up to it. An instant that was not noted, or lies
/// before its predecessor (an activation that waited for its fork), begins no phase of its own.
pub fn split(received: u64, stamps: &Stamps, known: u64) -> Timings {
    let mut last = received;
    let mut phase = |instant: u64| {
        let reached = instant.clamp(last, known.max(last));
        let micros = (reached - last) as f64 / 1000.0;
        last = reached;
        micros
    };
    let mut timings = Timings {
        queue: phase(stamps.requested),
        fork: phase(stamps.forked),
        vm: phase(stamps.vm),
        vcpus: phase(stamps.vcpus),
        restore: phase(stamps.restored),
        activate: phase(stamps.activated),
        enter: phase(stamps.entered),
        guest: phase(stamps.acknowledged),
        reply: phase(known),
        total: 0.0,
    };
    timings.total = known.saturating_sub(received) as f64 / 1000.0;
    timings
}

#[cfg(test)]
mod tests;
