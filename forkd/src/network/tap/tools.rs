//! The programs that configure the kernel's network.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::Error;

/// Directories that programs are looked for in.
const DIRECTORIES: [&str; 6] =
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// Most bytes of a program's words that are shown.
const SHOWN: usize = 500;

/// Where they are. They work on the network namespace of the thread that runs them.
#[derive(Clone, Debug)]
pub struct Tools {
    nft: PathBuf,
    ip: PathBuf,
}

impl Tools {
    /// Looks them up.
    ///
    /// # Errors
    /// One is not installed.
    pub fn find() -> Result<Self, Error> {
        Ok(Self { nft: find("nft")?, ip: find("ip")? })
    }

    /// Carries out commands of nft(8), all or none of them.
    pub fn nft(&self, commands: &str) -> Result<(), Error> {
        run(&self.nft, "nft", &["-f", "-"], commands).map(|_| ())
    }

    /// What nft(8) says to commands, as JSON. They are an argument, because of its standard input nft expects JSON, too.
    pub fn nft_json(&self, commands: &str) -> Result<String, Error> {
        run(&self.nft, "nft", &["-j", commands], "")
    }

    /// Carries out commands of ip(8), one a line, up to the first that fails.
    pub fn ip(&self, commands: &str) -> Result<(), Error> {
        run(&self.ip, "ip", &["-batch", "-"], commands).map(|_| ())
    }
}

fn find(name: &'static str) -> Result<PathBuf, Error> {
    let mut places = DIRECTORIES.iter().map(|directory| Path::new(directory).join(name));
    places.find(|path| path.is_file()).ok_or(Error::NoTool(name))
}

fn run(path: &Path, program: &'static str, args: &[&str], input: &str) -> Result<String, Error> {
    let failed = |said: &dyn std::fmt::Display| Error::Tool { program, said: said.to_string() };
    let mut child = Command::new(path)
        .args(args)
        .env_clear()
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(&error))?;
    // Nothing is written by these programs before they have read everything.
    let sent = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().map_err(|error| failed(&error))?;
    if !output.status.success() || sent.is_err() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.trim().replace('\n', " ");
        let shown: String = said.chars().take(SHOWN).collect();
        return Err(failed(&format_args!("{}: {shown}", output.status)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
