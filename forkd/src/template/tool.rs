//! Runs the programs that make root images. Cancelled, they are killed.

use std::{
    ffi::OsStr,
    io,
    process::{Output, Stdio},
};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{process::Command, time::timeout};

use crate::{
    api::error::{Code, Error},
    limits::TOOL_TIMEOUT,
};

/// Prefix that runs a program as the owner of all the ids a root file system uses, without being root: root is this
/// user, the rest are its subordinate ids (`/etc/subuid`).
pub const OWNER: [&str; 4] = ["unshare", "--map-root-user", "--map-auto", "--"];

/// Most bytes of a tool's output that are shown.
const SHOWN: usize = 2048;

/// A tool to run.
pub struct Tool(Command);

impl Tool {
    /// `program`, found in the usual directories.
    pub fn new(program: &str) -> Self {
        let mut command = Command::new(program);
        let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        command.env("PATH", path).env("LC_ALL", "C").stdin(Stdio::null()).kill_on_drop(true).current_dir("/");
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        Self(command)
    }

    /// `program` as the owner of all ids.
    pub fn as_owner(program: &str) -> Self {
        if rustix::process::geteuid().is_root() {
            return Self::new(program);
        }
        Self::new(OWNER[0]).args(&OWNER[1..]).args([program])
    }

    /// Adds arguments.
    #[must_use]
    pub fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.0.args(args);
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.0.env(name, value);
        self
    }

    /// Runs it to its end; `doing` completes "cannot ...".
    pub async fn run(mut self, doing: &str) -> Result<(), Error> {
        let name = self.0.as_std().get_program().to_string_lossy().into_owned();
        let failed = |cause: String| Error::new(Code::ToolFailed, format!("cannot {doing}")).because(cause);
        let output = match timeout(TOOL_TIMEOUT, output(&mut self.0)).await {
            Ok(Ok(output)) => output,
            Ok(Err(error)) => return Err(failed(format!("{name}: {error}"))),
            Err(_) => return Err(failed(format!("{name} took more than {} s", TOOL_TIMEOUT.as_secs()))),
        };
        if output.status.success() {
            return Ok(());
        }
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        let text = text.trim();
        let start = (text.len().saturating_sub(SHOWN)..=text.len()).find(|&at| text.is_char_boundary(at));
        Err(failed(format!("{name}: {}: {}", output.status, &text[start.unwrap_or(0)..])))
    }
}

/// Runs a command in a process group of its own, which ends with this future: tools start tools.
async fn output(command: &mut Command) -> io::Result<Output> {
    let child = command.spawn()?;
    let group = Group(child.id().and_then(|id| Pid::from_raw(id.cast_signed())));
    let output = child.wait_with_output().await;
    std::mem::forget(group);
    output
}

/// A process group that is killed when it is dropped.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.0 {
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}
