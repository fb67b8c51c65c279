//! One running command of a host connection.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use forkling_proto::rpc::{Exec, Exit, Kind};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal, WaitStatus};

use crate::command::{self, Environment, Request, Streams};
use crate::sys;

/// Bytes of input held for a command that does not read them.
const INPUT_LIMIT: usize = 256 * 1024;

/// How long output is awaited after a command has ended while a process it left behind holds the pipe.
const GRACE: Duration = Duration::from_millis(100);

/// One of a command's two outputs.
#[derive(Debug)]
pub struct Output {
    /// Frames its bytes go into.
    pub kind: Kind,
    /// Read end of the pipe.
    pub pipe: OwnedFd,
    /// Whether epoll watches it; not while the connection is congested.
    pub watched: bool,
    /// After the grace time: bytes still to be read.
    left: Option<u64>,
}

/// A command, from its start until its exit was sent.
#[derive(Debug)]
pub struct Call {
    /// The connection it belongs to.
    pub connection: u32,
    /// The host's number for it.
    pub number: u32,
    /// Process id and process group.
    pub pid: Pid,
    /// Write end of standard input and what waits to be written.
    pub stdin: Option<OwnedFd>,
    input: VecDeque<Vec<u8>>,
    input_len: usize,
    input_ended: bool,
    /// Standard output and error, each until its end.
    pub outputs: [Option<Output>; 2],
    exit: Option<Exit>,
    deadline: Option<Instant>,
    timed_out: bool,
}

impl Call {
    /// Starts a command.
    pub fn start(
        connection: u32,
        number: u32,
        exec: &Exec,
        environment: &Environment,
    ) -> Result<Self, command::Error> {
        let system = |errno: Errno| command::Error::System {
            program: exec.argv.first().cloned().unwrap_or_default(),
            source: errno.into(),
        };
        let pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(system);
        let ((child_stdin, stdin), (stdout, child_stdout), (stderr, child_stderr)) =
            (pipe()?, pipe()?, pipe()?);
        // Only this end: the command's own must block. The outputs are read only when epoll says they have bytes.
        rustix::io::ioctl_fionbio(&stdin, true).map_err(system)?;
        let request = Request {
            argv: &exec.argv,
            base: environment,
            env: &exec.env,
            cwd: exec.cwd.as_deref(),
            user: exec.user.as_deref(),
        };
        let streams = Streams { stdin: child_stdin, stdout: child_stdout, stderr: child_stderr };
        let pid = command::spawn(request, streams)?;
        let output = |kind, pipe| Some(Output { kind, pipe, watched: false, left: None });
        Ok(Self {
            connection,
            number,
            pid,
            stdin: Some(stdin),
            input: VecDeque::new(),
            input_len: 0,
            input_ended: false,
            outputs: [output(Kind::Stdout, stdout), output(Kind::Stderr, stderr)],
            exit: None,
            deadline: (exec.timeout_ms > 0)
                .then(|| Instant::now().checked_add(Duration::from_millis(exec.timeout_ms)))
                .flatten(),
            timed_out: false,
        })
    }

    /// Queues input and writes what the command takes; empty input is its end.
    pub fn feed(&mut self, bytes: Vec<u8>) {
        if bytes.is_empty() {
            self.input_ended = true;
        } else if self.stdin.is_some() && !self.input_ended {
            self.input_len += bytes.len();
            self.input.push_back(bytes);
        }
        self.pump_input();
    }

    /// Writes queued input until the pipe is full, then closes it if the input has ended.
    pub fn pump_input(&mut self) {
        let Some(stdin) = &self.stdin else { return };
        while let Some(front) = self.input.front_mut() {
            match rustix::io::write(stdin, front) {
                Ok(count) => {
                    self.input_len -= count;
                    front.drain(..count);
                    if front.is_empty() {
                        self.input.pop_front();
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                // The command has closed its end: what it did not read is lost, as in a shell's pipe.
                Err(_) => return self.close_input(),
            }
        }
        if self.input_ended {
            self.close_input();
        }
    }

    fn close_input(&mut self) {
        self.stdin = None;
        self.input.clear();
        self.input_len = 0;
        self.input_ended = true;
    }

    /// Whether input waits for the command to read.
    pub fn has_input(&self) -> bool {
        !self.input.is_empty()
    }

    /// Whether so much input waits that no more may be accepted.
    pub fn is_stuffed(&self) -> bool {
        self.input_len >= INPUT_LIMIT
    }

    /// Reads once from output `index` into `buffer`; 0 is the end, and closes it.
    pub fn read_output(&mut self, index: usize, buffer: &mut [u8]) -> usize {
        let Some(output) = &mut self.outputs[index] else { return 0 };
        let limit = output.left.map_or(buffer.len(), |left| buffer.len().min(left as usize));
        let count = match rustix::io::read(&output.pipe, &mut buffer[..limit]) {
            Ok(count) => count,
            Err(Errno::INTR | Errno::AGAIN) => return 0,
            Err(_) => 0,
        };
        if let Some(left) = &mut output.left {
            *left -= count as u64;
        }
        if count == 0 || output.left == Some(0) {
            self.outputs[index] = None;
        }
        count
    }

    /// Sends a signal to the command's process group, unless the command has ended.
    pub fn signal(&self, signal: u8) -> io::Result<()> {
        // A dead and reaped leader's id may already be somebody else's.
        if self.exit.is_some() { Ok(()) } else { sys::process::kill_group(self.pid, signal) }
    }

    /// Kills the process group, unless the command has ended.
    pub fn kill(&self) {
        // The only failure left is that the group is gone.
        let _ = self.signal(Signal::KILL.as_raw() as u8);
    }

    /// Records how the command ended and starts the grace time of its outputs.
    pub fn ended(&mut self, status: WaitStatus) {
        self.exit = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Some(Exit::Status(code)),
            (None, Some(signal)) if self.timed_out && signal == Signal::KILL.as_raw() => Some(Exit::TimedOut),
            (None, signal) => signal.map(Exit::Signal),
        };
        self.deadline = Some(Instant::now() + GRACE);
        self.close_input();
    }

    /// When [`Self::expire`] has something to do.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Acts on a deadline that has passed: kills a running command; of an ended one reads no more than what its
    /// pipes hold by now.
    pub fn expire(&mut self) {
        self.deadline = None;
        if self.exit.is_none() {
            self.kill();
            self.timed_out = true;
            return;
        }
        for slot in &mut self.outputs {
            let Some(output) = slot else { continue };
            match rustix::io::ioctl_fionread(&output.pipe) {
                Ok(left) if left > 0 => output.left = Some(left),
                _ => *slot = None,
            }
        }
    }

    /// How it ended, once all its output was read.
    pub fn finished(&self) -> Option<Exit> {
        self.exit.filter(|_| self.outputs.iter().all(Option::is_none))
    }
}
