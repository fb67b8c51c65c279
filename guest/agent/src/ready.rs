//! Bringing the workload to the point at which the template is frozen: services, warm-up, ready condition.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use forkling_proto::config::{GuestConfig, Ready};
use rustix::process::Pid;

use crate::command::{self, Environment, Request, Streams};
use crate::console;
use crate::reap::Reaper;
use crate::run::{self, Role};
use crate::waiters::Waiters;

/// Interval between two checks of a condition.
const INTERVAL: Duration = Duration::from_millis(20);

/// A warm-up command may well take minutes (downloads, compilers); the host has a limit for the whole build.
const WARM_UP_LIMIT: Duration = Duration::from_secs(24 * 60 * 60);

/// Why the template cannot be frozen.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A service was not started.
    #[error("service `{line}` was not started")]
    Service {
        /// Its arguments.
        line: String,
        /// Reason.
        source: command::Error,
    },
    /// A service failed too early.
    #[error("service `{line}` {outcome} before the template was ready; its output is on the console")]
    ServiceEnded {
        /// Its arguments.
        line: String,
        /// How it ended.
        outcome: String,
    },
    /// A warm-up command failed.
    #[error(transparent)]
    WarmUp(run::Error),
    /// The condition did not come true.
    #[error("not ready after {limit_ms} ms: {condition}")]
    TimedOut {
        /// The limit.
        limit_ms: u64,
        /// What was waited for.
        condition: String,
        /// Outcome of the last try of a ready command.
        source: Option<run::Error>,
    },
    /// The kernel refused.
    #[error("cannot watch for the ready condition")]
    System(#[source] io::Error),
}

/// Everything that runs before the freeze.
#[derive(Debug)]
pub struct Workload<'a> {
    /// What the template asks for.
    pub config: &'a GuestConfig,
    /// Environment of its commands.
    pub environment: &'a Environment,
    /// Collects the dead.
    pub reaper: &'a mut Reaper,
    /// Programs that ask for a forkpoint.
    pub waiters: &'a mut Waiters,
}

impl Workload<'_> {
    /// Returns when the guest may be frozen.
    pub fn bring_up(&mut self) -> Result<(), Error> {
        let services =
            self.config.services.iter().map(|argv| self.start(argv)).collect::<Result<Vec<_>, _>>()?;
        for (pid, _) in &services {
            self.reaper.watch(*pid);
        }
        for argv in &self.config.warm_up {
            console::say(&format!("warm-up: {}", command::line(argv)));
            let deadline = Instant::now() + WARM_UP_LIMIT;
            run::to_end(Role::WarmUp, argv, self.environment, self.reaper, deadline)
                .map_err(Error::WarmUp)?;
            self.check(&services)?;
        }
        self.wait(&services)?;
        self.check(&services)?;
        for (pid, _) in &services {
            self.reaper.forget(*pid);
        }
        Ok(())
    }

    fn start<'c>(&self, argv: &'c [String]) -> Result<(Pid, &'c [String]), Error> {
        let request = Request { argv, base: self.environment, env: &[], cwd: None, user: None };
        let pid = Streams::console()
            .and_then(|streams| command::spawn(request, streams))
            .map_err(|source| Error::Service { line: command::line(argv), source })?;
        console::say(&format!("service {}: {}", pid.as_raw_nonzero(), command::line(argv)));
        Ok((pid, argv))
    }

    /// A service that ends with status 0 has gone into the background; with anything else it has failed.
    fn check(&mut self, services: &[(Pid, &[String])]) -> Result<(), Error> {
        for (pid, argv) in services {
            match self.reaper.take(*pid) {
                Some(status) if status.exit_status() != Some(0) => {
                    let (line, outcome) = (command::line(argv), run::outcome(Some(status)));
                    return Err(Error::ServiceEnded { line, outcome });
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn wait(&mut self, services: &[(Pid, &[String])]) -> Result<(), Error> {
        let deadline = Instant::now() + Duration::from_millis(self.config.ready_timeout_ms);
        let mut last = None;
        while !self.is_ready(deadline, &mut last)? {
            self.check(services)?;
            if Instant::now() >= deadline {
                return Err(self.timed_out(last));
            }
            let asks = (self.config.ready == Ready::Forkpoint).then(|| self.waiters.fd());
            self.reaper.pause(asks, deadline.min(Instant::now() + INTERVAL)).map_err(Error::System)?;
        }
        Ok(())
    }

    fn is_ready(&mut self, deadline: Instant, last: &mut Option<run::Error>) -> Result<bool, Error> {
        match &self.config.ready {
            Ready::Immediately => Ok(true),
            Ready::Forkpoint => Ok(self.waiters.gather().map_err(Error::System)? > 0),
            Ready::Port(port) => Ok(accepts(*port)),
            Ready::Command(argv) => {
                match run::to_end(Role::Ready, argv, self.environment, self.reaper, deadline) {
                    Ok(()) => return Ok(true),
                    // The try that the deadline cut short says less than the one before it.
                    Err(run::Error::Failed { status: None, .. }) if last.is_some() => {}
                    Err(error) => *last = Some(error),
                }
                Ok(false)
            }
        }
    }

    fn timed_out(&self, source: Option<run::Error>) -> Error {
        let condition = match &self.config.ready {
            Ready::Immediately => unreachable!("this condition is always true"),
            Ready::Command(_) => "the ready command has not succeeded".to_owned(),
            Ready::Port(port) => format!("nothing accepts on TCP port {port} of the loopback interface"),
            Ready::Forkpoint => "the workload did not connect to the forkpoint socket".to_owned(),
        };
        Error::TimedOut { limit_ms: self.config.ready_timeout_ms, condition, source }
    }
}

fn accepts(port: u16) -> bool {
    let loopback =
        [SocketAddr::from((Ipv4Addr::LOCALHOST, port)), SocketAddr::from((Ipv6Addr::LOCALHOST, port))];
    loopback.iter().any(|address| TcpStream::connect_timeout(address, INTERVAL).is_ok())
}

#[cfg(test)]
mod tests;
