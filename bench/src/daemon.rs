//! A `forkd` of our own: own directories, own socket, ended by its process id.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use forkling_tests::proc;
use rustix::process::{Pid, Signal, kill_process};

use crate::client::Connection;

/// Longest start and longest orderly end of a daemon. In lab time waiting takes none, so it is counted in attempts.
const ATTEMPTS: u32 = 3000;
const PAUSE: Duration = Duration::from_millis(10);

/// A running daemon. Dropped, it ends, and its forks with it; killed, we take it with us.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// Starts `programs/forkd` over the state in `state`; socket and log lie in `run`.
    pub fn start(programs: &Path, state: &Path, run: &Path, options: &[&str]) -> anyhow::Result<Self> {
        let (socket, log) = (run.join("forkd.sock"), run.join("forkd.log"));
        let program = programs.join("forkd");
        ensure!(program.exists(), "{} is missing; build the workspace first", program.display());
        let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        // setpriv(1) becomes the daemon.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "TERM"]).arg(&program);
        command.arg("--state-dir").arg(state).arg("--runtime-dir").arg(run).arg("--socket").arg(&socket);
        command.args(options);
        command.env("NO_COLOR", "1").env_remove("FORKLING_SOCKET").env_remove("FORKLING_KERNEL");
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = command.spawn().context("cannot start forkd by setpriv(1) of util-linux")?;
        let mut daemon = Self { child, socket, log };
        daemon.wait_for_socket()?;
        Ok(daemon)
    }

    fn wait_for_socket(&mut self) -> anyhow::Result<()> {
        for _ in 0..ATTEMPTS {
            if let Some(status) = self.child.try_wait()? {
                bail!("forkd ended with {status}: {}", self.log());
            }
            // A socket of an earlier daemon in the same directory refuses connections.
            if Connection::open(&self.socket).is_ok() {
                return Ok(());
            }
            thread::sleep(PAUSE);
        }
        bail!("forkd does not answer: {}", self.log());
    }

    /// A new connection to it.
    pub fn connect(&self) -> anyhow::Result<Connection> {
        Connection::open(&self.socket)
    }

    /// Process id.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Its child that waits to be the next fork, if there is one.
    pub fn embryo(&self) -> Option<i32> {
        proc::children(self.pid()).into_iter().find(|&pid| proc::is_embryo(pid))
    }

    /// Its children that are not reaped yet, but for the net process and those that are kept ahead of need.
    pub fn children(&self) -> Vec<i32> {
        proc::children(self.pid())
            .into_iter()
            .filter(|&pid| proc::role(pid).as_deref() != Some("net") && !proc::is_ahead_of_need(pid))
            .collect()
    }

    /// The end of what it wrote to standard error.
    pub fn log(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Ends it and waits for that.
    pub fn end(mut self) -> anyhow::Result<()> {
        self.finish()
    }

    fn finish(&mut self) -> anyhow::Result<()> {
        if self.child.try_wait()?.is_some() {
            return Ok(());
        }
        let pid = Pid::from_raw(self.pid()).context("a process id")?;
        // Ours and not reaped, so the number is still its own.
        kill_process(pid, Signal::TERM)?;
        for _ in 0..ATTEMPTS {
            if self.child.try_wait()?.is_some() {
                return Ok(());
            }
            thread::sleep(PAUSE);
        }
        self.child.kill()?;
        self.child.wait()?;
        bail!("forkd did not end on SIGTERM: {}", self.log());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Err(error) = self.finish() {
            eprintln!("bench: {error:#}");
        }
    }
}

/// Waits until the process `pid` has ended, at most `patience`; whether it has.
pub fn wait_gone(pid: i32, patience: Duration) -> anyhow::Result<bool> {
    use rustix::{
        event::{PollFd, PollFlags, poll},
        process::{PidfdFlags, pidfd_open},
        time::Timespec,
    };
    let Ok(fd) = pidfd_open(Pid::from_raw(pid).context("a process id")?, PidfdFlags::empty()) else {
        return Ok(true);
    };
    let until = Instant::now() + patience;
    loop {
        let rest = until.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: rest.as_secs() as i64, tv_nsec: i64::from(rest.subsec_nanos()) };
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)) {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result? > 0),
        }
    }
}
