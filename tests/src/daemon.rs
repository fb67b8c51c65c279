//! A real `forkd` with directories of its own.

use std::{
    fs::{self, File},
    ops::Deref,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use forkling_fixtures::null_guest;
use forkling_vmm::snapshot::{CHUNK, Snapshot};
use rustix::process::Signal;
use tempfile::TempDir;

use crate::{api::Client, eventually, overdue::Overdue, proc, program};

/// Longest start of a daemon.
const START: Duration = Duration::from_secs(20);

/// Longest orderly end of a daemon.
const END: Duration = Duration::from_secs(20);

/// Longest life of a process whose daemon has ended: a promise.
pub const ORPHANS: Duration = Duration::from_secs(2);

/// Where a daemon keeps everything.
#[derive(Clone, Debug)]
enum Directory {
    /// Removed with its last owner.
    Own(Arc<TempDir>),
    /// Whoever made it removes it.
    Shared(PathBuf),
}

/// How to start a daemon.
#[derive(Clone, Debug)]
pub struct Settings {
    directory: Directory,
    /// Extra arguments.
    pub args: Vec<String>,
    programs: Option<PathBuf>,
    /// Limit of open descriptors, when not that of the test.
    pub descriptors: Option<u64>,
    /// User and group, when not those of the test.
    pub user: Option<(u32, u32)>,
    /// A process in whose network namespace the daemon lives, when not in that of the test.
    pub network_of: Option<i32>,
}

impl Default for Settings {
    fn default() -> Self {
        // In /tmp whatever TMPDIR says: socket paths are short.
        let directory = tempfile::Builder::new()
            .prefix("forkling-test-")
            .tempdir_in("/tmp")
            .expect("/tmp can be written");
        Self::in_directory(Directory::Own(Arc::new(directory)))
    }
}

impl Settings {
    /// In a directory that outlives the test, for daemons one after the other.
    pub fn shared(directory: &Path) -> Self {
        Self::in_directory(Directory::Shared(directory.to_owned()))
    }

    fn in_directory(directory: Directory) -> Self {
        let settings = Self {
            directory,
            args: Vec::new(),
            programs: None,
            descriptors: None,
            user: None,
            network_of: None,
        };
        fs::write(settings.null_guest(), null_guest::PROGRAM).expect("the null guest can be written");
        settings
    }

    /// As another user, with programs that it can reach. Call [`Self::give_away`] before the start.
    #[must_use]
    pub fn as_user(mut self, user: u32, group: u32) -> Self {
        let programs = self.path().join("bin");
        fs::create_dir(&programs).expect("the directory is empty");
        for name in ["forkd", "forkling-vmm", "forkling-agent"] {
            fs::copy(program(name), programs.join(name)).expect("programs can be copied");
        }
        self.programs = Some(programs);
        self.user = Some((user, group));
        self
    }

    /// Gives the directory and all in it to the daemon's user.
    ///
    /// # Panics
    /// When there is none.
    pub fn give_away(&self) {
        let (user, group) = self.user.expect("another user was named");
        let status = Command::new("chown").arg("-R").arg(format!("{user}:{group}")).arg(self.path()).status();
        assert!(status.expect("chown is there").success());
    }

    fn program(&self, name: &str) -> PathBuf {
        self.programs.as_ref().map_or_else(|| program(name), |programs| programs.join(name))
    }

    /// With more arguments.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Where everything of the daemon lies.
    pub fn path(&self) -> &Path {
        match &self.directory {
            Directory::Own(directory) => directory.path(),
            Directory::Shared(directory) => directory,
        }
    }

    /// The null guest's program.
    pub fn null_guest(&self) -> PathBuf {
        self.path().join("null.bin")
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.path().join("run/forkd.sock")
    }

    /// The daemon's state directory.
    pub fn state(&self) -> PathBuf {
        self.path().join("state")
    }

    /// The snapshot directory of a template.
    pub fn snapshot(&self, template: &str) -> PathBuf {
        self.state().join("templates").join(template).join("snapshot")
    }

    fn log(&self) -> PathBuf {
        self.path().join("log")
    }

    /// Starts the daemon and waits until it answers.
    ///
    /// # Panics
    /// When it does not.
    pub fn start(&self) -> Daemon {
        let child = self.spawn();
        let client = Client::new(&self.socket());
        let overdue = Overdue::watch(child.id().cast_signed());
        let mut daemon = Daemon { child, client, settings: self.clone(), _overdue: overdue };
        let pid = daemon.pid();
        let start = Instant::now();
        while daemon.client.version().is_none_or(|version| version.pid != pid) {
            let ended = daemon.child.try_wait().expect("a child can be waited for");
            assert!(
                ended.is_none() && start.elapsed() < START,
                "forkd does not answer; {ended:?}: {}",
                daemon.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        daemon
    }

    /// Starts a daemon that is expected to end by itself; its status and standard error.
    ///
    /// # Panics
    /// When it goes on running.
    pub fn refused(&self) -> (ExitStatus, String) {
        let mut child = self.spawn();
        let start = Instant::now();
        loop {
            if let Some(status) = child.try_wait().expect("a child can be waited for") {
                return (status, fs::read_to_string(self.log()).expect("the log is there"));
            }
            if start.elapsed() > START {
                let _ = child.kill();
                let _ = child.wait();
                panic!("forkd runs although it should refuse");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn spawn(&self) -> Child {
        let log = File::create(self.log()).expect("the log can be written");
        let mut command = match (self.descriptors, self.network_of) {
            (None, None) => Command::new(self.program("forkd")),
            (None, Some(pid)) => {
                // So does nsenter(1).
                let mut command = Command::new("nsenter");
                command.args(["--net", "--target", &pid.to_string()]).arg(self.program("forkd"));
                command
            }
            (Some(limit), _) => {
                // prlimit(1) becomes the daemon.
                let mut command = Command::new("prlimit");
                command.arg(format!("--nofile={limit}:{limit}")).arg(self.program("forkd"));
                command
            }
        };
        command.args(["--state-dir".as_ref(), self.state().as_os_str()]);
        command.args(["--runtime-dir".as_ref(), self.path().join("run").as_os_str()]);
        command.args(["--vmm".as_ref(), self.program("forkling-vmm").as_os_str()]);
        if !self.args.iter().any(|arg| arg == "--socket") {
            command.args(["--socket".as_ref(), self.socket().as_os_str()]);
        }
        command
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a descriptor"))
            .stderr(log);
        command.env("NO_COLOR", "1").env_remove("FORKLING_SOCKET").env_remove("FORKLING_KERNEL");
        if let Some((uid, gid)) = self.user {
            command.uid(uid).gid(gid).env("HOME", self.path());
        }
        command.spawn().expect("forkd can be started")
    }
}

/// A running daemon. Dropped, it is ended in order, and must have taken every process with it.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    /// Talks to it.
    pub client: Client,
    /// How it was started.
    pub settings: Settings,
    _overdue: Overdue,
}

impl Daemon {
    /// A daemon with fresh directories.
    pub fn start() -> Self {
        Settings::default().start()
    }

    /// A daemon with a null template `null`.
    pub fn with_null() -> Self {
        let daemon = Self::start();
        daemon.build_null("null");
        daemon
    }

    /// Builds a null template.
    ///
    /// # Panics
    /// When it cannot be built.
    pub fn build_null(&self, name: &str) {
        let built = self.client.build(&crate::spec::null(name, &self.settings.null_guest()));
        if let Err(error) = built.outcome {
            panic!("the null template cannot be built: {error:?}; {}", self.log());
        }
    }

    /// Process id.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Living children: zygotes, forks, builders, tools; not those that are kept ahead of need.
    pub fn processes(&self) -> Vec<proc::Process> {
        self.children().into_iter().filter_map(proc::Process::find).collect()
    }

    /// Children, dead ones included, but for those that are kept ahead of need.
    pub fn children(&self) -> Vec<i32> {
        proc::children(self.pid()).into_iter().filter(|&pid| !proc::is_ahead_of_need(pid)).collect()
    }

    /// Its embryos, one for each template in use.
    pub fn embryos(&self) -> Vec<i32> {
        proc::children(self.pid()).into_iter().filter(|&pid| proc::is_embryo(pid)).collect()
    }

    fn all_processes(&self) -> Vec<proc::Process> {
        proc::children(self.pid()).into_iter().filter_map(proc::Process::find).collect()
    }

    /// What it wrote to standard error.
    pub fn log(&self) -> String {
        fs::read_to_string(self.settings.log()).unwrap_or_default()
    }

    /// Process id of a template's zygote.
    ///
    /// # Panics
    /// When it has none.
    pub fn zygote(&self, template: &str) -> i32 {
        self.client
            .template(template)
            .expect("the template is there")
            .zygote_pid
            .expect("the template is loaded")
    }

    /// Process id of a template's zygote; loads the template if it is not.
    ///
    /// # Panics
    /// When it cannot be loaded.
    pub fn load(&self, template: &str) -> i32 {
        self.client.reload(template).expect("the template can be loaded").zygote_pid.expect("it is loaded")
    }

    /// Waits until all memory of a loaded template that is not zero lies in its image.
    ///
    /// # Panics
    /// When it does not in a minute.
    pub fn wait_complete(&self, template: &str) {
        let snapshot = Snapshot::open(&self.settings.snapshot(template)).expect("a valid snapshot");
        let all = snapshot.manifest().image.data_chunks * CHUNK as u64;
        // By the list: to inspect a template the daemon looks at thousands of files, which on one emulated core takes the time from
        // the thread that loads it, the one of the lowest priority.
        let resident = || {
            let found = self.client.templates().into_iter().find(|info| info.name == template);
            found.expect("the template is there").resident_bytes
        };
        eventually(Duration::from_secs(60), "the image is complete", || {
            let there = resident();
            if there >= Some(all) { Ok(()) } else { Err(format!("{there:?} of {all} bytes are")) }
        });
    }

    /// Waits until the daemon has exactly `count` children, zombies included, but for its net process and those that are kept
    /// ahead of need.
    pub fn settle(&self, count: usize) {
        eventually(Duration::from_secs(20), "processes of dead forks go away", || {
            let mut children = self.children();
            children.retain(|&pid| proc::role(pid).as_deref() != Some("net"));
            if children.len() == count {
                Ok(())
            } else {
                Err(format!("{count} expected, there are {children:?}"))
            }
        });
    }

    /// Kills it with SIGKILL; returns how long its processes outlived it.
    ///
    /// # Panics
    /// When they do so for longer than promised.
    pub fn crash(mut self) -> (Duration, Settings) {
        let processes = self.all_processes();
        let killed = Instant::now();
        self.child.kill().expect("it runs");
        self.child.wait().expect("a child can be waited for");
        gone(&processes, ORPHANS);
        (killed.elapsed(), self.settings.clone())
    }

    /// Ends it by SIGTERM and returns its status.
    ///
    /// # Panics
    /// When it, or a process of its own, goes on.
    pub fn stop(mut self) -> (ExitStatus, Settings) {
        let status = self.end().expect("forkd ends on SIGTERM");
        (status, self.settings.clone())
    }

    fn end(&mut self) -> Option<ExitStatus> {
        if let Ok(Some(status)) = self.child.try_wait() {
            return Some(status);
        }
        let processes = self.all_processes();
        proc::signal(self.pid(), Signal::TERM);
        let start = Instant::now();
        while start.elapsed() < END {
            if let Ok(Some(status)) = self.child.try_wait() {
                gone(&processes, ORPHANS);
                return Some(status);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        None
    }
}

fn gone(processes: &[proc::Process], patience: Duration) {
    eventually(patience, "processes end with their daemon", || {
        let left: Vec<_> = processes.iter().filter(|process| process.is_alive()).collect();
        if left.is_empty() { Ok(()) } else { Err(format!("there are {left:?}")) }
    });
}

impl Deref for Daemon {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("log of forkd:\n{}", self.log());
            let _ = self.child.kill();
            let _ = self.child.wait();
            return;
        }
        self.end().expect("forkd ends on SIGTERM");
    }
}
