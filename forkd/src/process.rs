//! Child processes: started from one thread that never ends, signalled and reaped by pidfd.
//!
//! A child's parent-death signal refers to the *thread* that started it (`prctl(2)`), and forks made with
//! CLONE_PARENT inherit that thread as parent. So every process of `forkling-vmm` comes from [`Spawner`]'s thread,
//! which lives as long as the daemon.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    process::{Command, Stdio},
    thread,
};

use crossbeam::channel;
use forkling_vmm::sys::resident::ResidentProgram;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_open, pidfd_send_signal, waitid,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::oneshot,
};

use crate::reactor::watch;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// With this status.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exited with status {code}"),
            Self::Signal(signal) => write!(f, "was killed by signal {signal}"),
        }
    }
}

/// A child of this process, alive or not yet reaped.
#[derive(Debug)]
pub struct Process {
    pid: Pid,
    fd: AsyncFd<OwnedFd>,
}

impl Process {
    /// Takes charge of child `pid`. Fails with `ECHILD` when it is not a child of this process.
    pub fn adopt(pid: i32) -> io::Result<Self> {
        let pid =
            Some(pid).filter(|&pid| pid > 0).and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
        let fd = pidfd_open(pid, PidfdFlags::empty())?;
        let probe = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        waitid(WaitId::PidFd(fd.as_fd()), probe)?;
        Ok(Self { pid, fd: watch(fd, Interest::READABLE)? })
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Kills it, at once and for good. A process that is already gone is no error.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(self.fd.get_ref(), Signal::KILL);
    }

    /// Whether it has not ended.
    pub fn is_alive(&self) -> bool {
        let probe = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        matches!(waitid(WaitId::PidFd(self.fd.get_ref().as_fd()), probe), Ok(None))
    }

    /// Waits for its end and reaps it. To be called by one task only, once to completion.
    pub async fn wait(&self) -> io::Result<Exit> {
        loop {
            let mut ready = self.fd.readable().await?;
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
            match waitid(WaitId::PidFd(self.fd.get_ref().as_fd()), options)? {
                Some(status) => return Ok(exit_of(&status)),
                None => ready.clear_ready(),
            }
        }
    }
}

/// A process that is killed and reaped when it is dropped.
#[derive(Debug)]
pub struct Doomed(Option<Process>);

impl Doomed {
    /// Takes charge of `process`.
    pub fn new(process: Process) -> Self {
        Self(Some(process))
    }

    /// Whether it has not ended.
    pub fn is_alive(&self) -> bool {
        self.0.as_ref().is_some_and(Process::is_alive)
    }

    /// Lets it live.
    pub fn spare(mut self) -> Process {
        self.0.take().expect("waited for once")
    }

    /// Waits for its end.
    pub async fn wait(&mut self) -> io::Result<Exit> {
        let exit = self.0.as_ref().expect("waited for once").wait().await;
        self.0 = None;
        exit
    }
}

impl Drop for Doomed {
    fn drop(&mut self) {
        if let Some(process) = self.0.take() {
            process.kill();
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn(async move { process.wait().await });
            }
        }
    }
}

fn exit_of(status: &WaitIdStatus) -> Exit {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => unreachable!("waitid was asked for ends only"),
    }
}

struct Job {
    program: Program,
    role: &'static str,
    control: OwnedFd,
    done: oneshot::Sender<io::Result<u32>>,
}

/// Which program a process runs.
#[derive(Clone, Copy, Debug)]
enum Program {
    Vmm,
    /// This one.
    Daemon,
}

/// Starts processes of `forkling-vmm`, and the net process.
#[derive(Clone, Debug)]
pub struct Spawner(channel::Sender<Job>);

impl Spawner {
    /// Starts the thread. It ends, and with it every process it started, when the last clone is dropped.
    pub fn new(program: PathBuf) -> io::Result<Self> {
        let (sender, jobs) = channel::unbounded::<Job>();
        thread::Builder::new().name("spawner".to_owned()).spawn(move || {
            // The first fork of a template starts a zygote, which would wait for the disk if memory was short meanwhile.
            let _resident = ResidentProgram::new(&program)
                .inspect_err(|error| tracing::debug!(%error, "the VMM program is not kept in memory"));
            for job in jobs {
                let started = match job.program {
                    Program::Vmm => spawn(&program, job.role, job.control),
                    // Still this program when its file was replaced.
                    Program::Daemon => spawn("/proc/self/exe".as_ref(), job.role, job.control),
                };
                // A caller that went away leaves a process whose control socket is closed: it ends by itself.
                let _ = job.done.send(started);
            }
        })?;
        Ok(Self(sender))
    }

    /// Starts `forkling-vmm ROLE` with `control` as its control socket.
    pub async fn spawn(&self, role: &'static str, control: OwnedFd) -> io::Result<Process> {
        self.start(Program::Vmm, role, control).await
    }

    /// Starts `forkd net` with `control` as its control socket.
    pub async fn spawn_net(&self, control: OwnedFd) -> io::Result<Process> {
        self.start(Program::Daemon, "net", control).await
    }

    async fn start(&self, program: Program, role: &'static str, control: OwnedFd) -> io::Result<Process> {
        let (done, pid) = oneshot::channel();
        let gone = || io::Error::other("the spawner thread is gone; restart the daemon");
        self.0.send(Job { program, role, control, done }).map_err(|_| gone())?;
        let pid = pid.await.map_err(|_| gone())??;
        Process::adopt(pid.cast_signed())
    }
}

fn spawn(program: &std::path::Path, role: &str, control: OwnedFd) -> io::Result<u32> {
    // `CONTROL_FD` is standard input.
    const { assert!(forkling_vmm::protocol::CONTROL_FD == 0) };
    let mut command = Command::new(program);
    command.arg(role).stdin(Stdio::from(control)).stdout(Stdio::null()).stderr(Stdio::inherit()).env_clear();
    for name in ["FORKLING_LOG", "RUST_BACKTRACE"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    // A fork has three threads and little to allocate: a heap for each would only be memory.
    command.env("MALLOC_ARENA_MAX", "1");
    // The net process copies payloads between buffers that are aligned differently, where `rep movsb`, which the C library
    // takes for more than 4 KiB, is slow on many processors: vectors, whatever the length.
    if role == "net" {
        command.env("GLIBC_TUNABLES", "glibc.cpu.x86_rep_movsb_threshold=1073741824");
    }
    // Its working directory is this one's until it changes it itself: asked for here, it would keep the library from vfork(2), and
    // a plain fork copies the page tables of the daemon, which takes as long as the start of the program.
    Ok(command.spawn()?.id())
}

#[cfg(test)]
mod tests;
