//! Running a command to its end while nothing else is served: warm-up, ready checks, on-fork hooks.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::{Pid, Signal, WaitStatus};

use crate::command::{self, Environment, Request, Streams};
use crate::console;
use crate::reap::Reaper;
use crate::sys;

/// How much of a failed command's standard error goes into the message, in bytes.
const TAIL: usize = 600;

/// How much of a command's standard error goes to the console, in bytes.
const SHOWN: usize = 4096;

/// What a command is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Prepares the template.
    WarmUp,
    /// Tells whether the template is ready; asked many times, so its output is not shown.
    Ready,
    /// Adapts a fork to its identity.
    Hook,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::WarmUp => "warm-up command",
            Self::Ready => "ready command",
            Self::Hook => "on-fork hook",
        })
    }
}

/// Why a command did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It was not started.
    #[error("{role} `{line}` was not started")]
    Start {
        /// What the command is for.
        role: Role,
        /// Its arguments.
        line: String,
        /// Reason.
        source: command::Error,
    },
    /// It ended otherwise than with status 0.
    #[error("{role} `{line}` {}; {}", outcome(*status), shown(tail))]
    Failed {
        /// What the command is for.
        role: Role,
        /// Its arguments.
        line: String,
        /// How it ended; none if it was killed at its deadline.
        status: Option<WaitStatus>,
        /// Last bytes of its standard error.
        tail: String,
    },
    /// The agent cannot look after it.
    #[error("cannot wait for {role} `{line}`")]
    Wait {
        /// What the command is for.
        role: Role,
        /// Its arguments.
        line: String,
        /// Reason.
        source: io::Error,
    },
}

/// Runs `argv` until it ends, at most until `deadline`; only status 0 is success. Its output goes to the console.
///
/// Standard error is collected in memory and shown when the command has ended. A pipe would kill daemons the command
/// leaves behind (SIGPIPE) as soon as nobody reads it; a sealed file only refuses what they write later.
pub fn to_end(
    role: Role,
    argv: &[String],
    environment: &Environment,
    reaper: &mut Reaper,
    deadline: Instant,
) -> Result<(), Error> {
    let line = || command::line(argv);
    let waiting = |source: io::Error| Error::Wait { role, line: line(), source };
    let log = rustix::fs::memfd_create("stderr", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(|errno| waiting(errno.into()))?;
    let stderr = log.try_clone().map_err(waiting)?;
    let stdout = if role == Role::Ready { command::null() } else { command::own(io::stdout()) };
    let (stdin, stdout) = (command::null().map_err(waiting)?, stdout.map_err(waiting)?);
    let streams = Streams { stdin, stdout, stderr };
    let request = Request { argv, base: environment, env: &[], cwd: None, user: None };
    let pid =
        command::spawn(request, streams).map_err(|source| Error::Start { role, line: line(), source })?;
    reaper.watch(pid);
    let status = reaper.wait_for(pid, deadline).map_err(waiting)?;
    if status.is_none() {
        kill(pid, reaper).map_err(waiting)?;
    }
    let output = contents(&log).map_err(waiting)?;
    if role != Role::Ready {
        console::write(&output);
    }
    match status {
        Some(status) if status.exit_status() == Some(0) => Ok(()),
        status => Err(Error::Failed { role, line: line(), status, tail: command::tail(&output, TAIL) }),
    }
}

/// How a process ended, as the rest of a sentence; `None` for "not in time".
pub fn outcome(status: Option<WaitStatus>) -> String {
    match status {
        None => "did not end in time and was killed".to_owned(),
        Some(status) => match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => format!("exited with status {code}"),
            (_, Some(signal)) => format!("was killed by signal {signal}"),
            _ => "changed its state".to_owned(),
        },
    }
}

fn shown(tail: &str) -> String {
    if tail.is_empty() {
        "it wrote nothing to its standard error".to_owned()
    } else {
        format!("its standard error ends with: {tail}")
    }
}

fn kill(pid: Pid, reaper: &mut Reaper) -> io::Result<()> {
    sys::process::kill_group(pid, Signal::KILL.as_raw() as u8)?;
    reaper.wait_for(pid, Instant::now() + Duration::from_secs(5)).map(drop)
}

/// The last bytes of `log`, which takes no more from now on.
fn contents(log: &OwnedFd) -> io::Result<Vec<u8>> {
    rustix::fs::fcntl_add_seals(log, SealFlags::GROW | SealFlags::SEAL)?;
    let size = rustix::fs::fstat(log)?.st_size as u64;
    let mut output = vec![0; SHOWN.min(size as usize)];
    let start = size - output.len() as u64;
    let count = rustix::io::pread(log, &mut output, start)?;
    output.truncate(count);
    Ok(output)
}

#[cfg(test)]
mod tests;
