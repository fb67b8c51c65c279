//! Probes: what this host offers, and what to do where it falls short. Safe to run anywhere; takes well under 300 ms.

mod kernel;
mod kvm;
mod native;

use serde::{Deserialize, Serialize};

pub use kvm::kvm_flavour;

/// How far a host meets one requirement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// As wished.
    Ok,
    /// Works, with less speed or less function.
    Degraded,
    /// Does not work without it.
    Missing,
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// What was looked at.
    pub name: String,
    /// How far it meets the requirement.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What to do about it, unless `status` is ok.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Line {
    fn ok(name: &str, found: impl Into<String>) -> Self {
        Self { name: name.into(), status: Status::Ok, found: found.into(), remedy: None }
    }

    fn degraded(name: &str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        let remedy = Some(remedy.into());
        Self { name: name.into(), status: Status::Degraded, found: found.into(), remedy }
    }

    fn missing(name: &str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { status: Status::Missing, ..Self::degraded(name, found, remedy) }
    }
}

/// What a host offers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// All findings, the most important first.
    pub lines: Vec<Line>,
    /// KVM can be used at all: the null guest runs.
    pub runs_kvm: bool,
    /// A stock Linux guest runs. Where it does not, use the lab.
    pub runs_linux: bool,
}

/// Looks at this host.
pub fn probe() -> Report {
    let found = kvm::probe();
    let mut lines = found.lines;
    lines.extend(kernel::probe());
    Report { lines, runs_kvm: found.runs_kvm, runs_linux: found.runs_linux }
}

#[cfg(test)]
mod tests;
