//! An outside: network namespaces with public addresses, a resolver and servers. They need root, or user namespaces.

use std::{
    io::{BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use forkling_tests::daemon::Settings;
use rustix::process::{Pid, Signal, kill_process_group};
use tempfile::TempDir;

use crate::guest;

/// The outside, as long as this lives.
pub struct World {
    process: Child,
    inside: i32,
    directory: TempDir,
}

impl World {
    /// Starts everything of it.
    pub fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut process = Command::new("unshare")
            .args(["--net", "bash", "-c", include_str!("world.sh"), "world"])
            .arg(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("unshare(1) is there");
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let inside = line.trim().parse().unwrap_or_else(|_| panic!("no outside: {line:?}; are you root?"));
        Self { process, inside, directory }
    }

    /// Of a daemon that lives in it.
    pub fn settings(&self) -> Settings {
        let mut settings = guest::settings().arg("--resolver").arg("11.0.0.254");
        settings.network_of = Some(self.inside);
        settings
    }

    /// Of the TLS server.
    pub fn certificate(&self) -> PathBuf {
        self.directory.path().join("cert.pem")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // All of its group, which is its own.
        let group = Pid::from_child(&self.process);
        let _ = kill_process_group(group, Signal::KILL);
        let _ = self.process.wait();
    }
}
