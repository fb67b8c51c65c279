//! Starting programs: environment, lookup in `PATH`, user, working directory.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::Access;
use rustix::process::{Gid, Pid, Uid};

use crate::sys::spawn::{self, Ids, Program};
use crate::users::{self, User};

/// Where commands run that name no other place: the agent's own working directory, so that nothing has to be done for it.
const DIRECTORY: &str = "/";

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Environment variables in the order of their names.
pub type Environment = BTreeMap<String, String>;

/// Why a command was not started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No program with this name can be executed.
    #[error("{0} was not found or is not executable")]
    NotFound(String),
    /// The working directory is none.
    #[error("working directory {0} does not exist")]
    NoSuchDirectory(String),
    /// Nobody has this name.
    #[error("user {0} does not exist")]
    NoSuchUser(String),
    /// Nothing the kernel would take as arguments or environment.
    #[error("{0}")]
    Invalid(&'static str),
    /// The kernel refused.
    #[error("cannot start {program}")]
    System {
        /// `argv[0]`.
        program: String,
        /// Its reason.
        source: io::Error,
    },
}

/// A command to start.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Program and arguments.
    pub argv: &'a [String],
    /// Environment of every command of this fork.
    pub base: &'a Environment,
    /// Added to it, stronger.
    pub env: &'a [(String, String)],
    /// Working directory; `/` if none.
    pub cwd: Option<&'a str>,
    /// User name or id; root if none.
    pub user: Option<&'a str>,
}

/// Standard input, output and error of a command.
#[derive(Debug)]
pub struct Streams {
    /// Input.
    pub stdin: OwnedFd,
    /// Output.
    pub stdout: OwnedFd,
    /// Error.
    pub stderr: OwnedFd,
}

/// What swallows output and gives no input.
pub fn null() -> io::Result<OwnedFd> {
    Ok(File::options().read(true).write(true).open("/dev/null")?.into())
}

/// One of the agent's own streams, for a command as well.
pub fn own(stream: impl AsFd) -> io::Result<OwnedFd> {
    stream.as_fd().try_clone_to_owned()
}

impl Streams {
    /// No input, and output where the agent's own goes.
    pub fn console() -> Result<Self, Error> {
        let open = || Ok(Self { stdin: null()?, stdout: own(io::stdout())?, stderr: own(io::stderr())? });
        open().map_err(|source| Error::System {
            program: "a command: its streams are not to be had".into(),
            source,
        })
    }
}

/// What every command starts from: `PATH` and root's identity, overridden by the template's environment.
pub fn base_environment(template: &[(String, String)]) -> Environment {
    let defaults = [("PATH", DEFAULT_PATH), ("HOME", "/root"), ("USER", "root"), ("LOGNAME", "root")];
    let mut environment: Environment =
        defaults.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    environment.extend(template.iter().cloned());
    environment
}

/// Starts a command in a process group of its own and returns its process id, which is also the group's.
pub fn spawn(request: Request<'_>, streams: Streams) -> Result<Pid, Error> {
    check(request)?;
    if let Some(cwd) = request.cwd.filter(|cwd| !Path::new(cwd).is_dir()) {
        return Err(Error::NoSuchDirectory(cwd.to_owned()));
    }
    let cwd = request.cwd.unwrap_or(DIRECTORY);
    let user = request.user.map(find_user).transpose()?;
    let mut environment = request.base.clone();
    if let Some(user) = &user {
        for (name, value) in [("HOME", &user.home), ("USER", &user.name), ("LOGNAME", &user.name)] {
            environment.insert(name.to_owned(), value.clone());
        }
    }
    environment.extend(request.env.iter().cloned());
    let name = &request.argv[0];
    let program = find_program(name, cwd, environment.get("PATH").map_or(DEFAULT_PATH, String::as_str))
        .ok_or_else(|| Error::NotFound(name.clone()))?;
    let text = |text: String| CString::new(text).expect("no NUL: it was checked");
    let program = Program {
        path: CString::new(program.into_os_string().into_vec()).expect("no NUL: its parts were checked"),
        arguments: request.argv.iter().cloned().map(text).collect(),
        environment: environment.into_iter().map(|(name, value)| text(format!("{name}={value}"))).collect(),
        directory: (cwd != DIRECTORY).then(|| text(cwd.to_owned())),
        streams: [streams.stdin, streams.stdout, streams.stderr],
        user: user.map(|User { uid, gid, groups, .. }| Ids {
            uid: Uid::from_raw(uid),
            gid: Gid::from_raw(gid),
            groups: groups.into_iter().map(Gid::from_raw).collect(),
        }),
    };
    // Waiting is the reaper's business.
    spawn::spawn(&program).map_err(|error| refused(name, error))
}

fn check(request: Request<'_>) -> Result<(), Error> {
    let Some(program) = request.argv.first() else {
        return Err(Error::Invalid("argv is empty; it needs at least the program"));
    };
    if program.is_empty() {
        return Err(Error::Invalid("the program's name is empty"));
    }
    let cwd = request.cwd.into_iter();
    let pairs = request.env.iter().flat_map(|(name, value)| [name, value]);
    if request.argv.iter().chain(pairs).map(String::as_str).chain(cwd).any(|text| text.contains('\0')) {
        return Err(Error::Invalid("argv, env and cwd must not contain NUL bytes"));
    }
    if request.env.iter().any(|(name, _)| name.is_empty() || name.contains('=')) {
        return Err(Error::Invalid("names in env must not be empty or contain '='"));
    }
    Ok(())
}

fn find_user(name: &str) -> Result<User, Error> {
    match users::lookup(name, Path::new("/etc")) {
        Ok(Some(user)) => Ok(user),
        Ok(None) => Err(Error::NoSuchUser(name.to_owned())),
        Err(source) => Err(Error::System { program: "a command: users are unreadable".into(), source }),
    }
}

/// The file to execute for `name`.
fn find_program(name: &str, cwd: &str, path: &str) -> Option<PathBuf> {
    let candidate = |directory: &str| {
        let file = Path::new(cwd).join(directory).join(name);
        (file.is_file() && rustix::fs::access(&file, Access::EXEC_OK).is_ok()).then_some(file)
    };
    if name.starts_with('/') {
        // Whether it is there the kernel says, without another look-up.
        return Some(name.into());
    }
    if name.contains('/') {
        return candidate("");
    }
    path.split(':').find_map(candidate)
}

fn refused(name: &str, error: io::Error) -> Error {
    match error.kind() {
        // The file was there a moment ago: its interpreter is missing, or the user may not reach it.
        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => Error::NotFound(name.to_owned()),
        _ if error.raw_os_error() == Some(rustix::io::Errno::NOEXEC.raw_os_error()) => {
            Error::NotFound(name.to_owned())
        }
        _ => Error::System { program: name.to_owned(), source: error },
    }
}

/// `argv` as one line for messages.
pub fn line(argv: &[String]) -> String {
    let line = argv.join(" ");
    let end = line.floor_char_boundary(200);
    if end < line.len() { format!("{}...", &line[..end]) } else { line }
}

/// The last `limit` bytes of `output` as text without surrounding white space.
pub fn tail(output: &[u8], limit: usize) -> String {
    let start = output.len().saturating_sub(limit);
    String::from_utf8_lossy(&output[start..]).trim().to_owned()
}

#[cfg(test)]
mod tests;
