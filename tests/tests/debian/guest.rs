//! The Debian templates and the service in them that lived through the freeze.

use std::{path::PathBuf, sync::OnceLock, time::Instant};

use forkling_daemon::api::types::ForkInfo;
use forkling_tests::{
    api::Client,
    daemon::{Daemon, Settings},
    spec,
};
use serde::Deserialize;
use serde_json::{Value, json};

/// Name of the template with one vCPU.
pub const ONE: &str = "debian";

/// Name of the template with two.
pub const TWO: &str = "debian-smp";

/// How long the timer of the witness is set, in seconds of guest time: longer than the rest of the build takes after
/// it is armed, short enough to wait for.
pub const TIMER_SECONDS: f64 = 8.0;

/// Asks the witness.
const ASK: &str = "exec 3<>/dev/tcp/127.0.0.1/7000; cat <&3";

/// What the witness says.
#[derive(Clone, Debug, Deserialize)]
pub struct Witness {
    pub pid: u32,
    pub boot_id: String,
    pub secret: String,
    pub getrandom: String,
    pub kernel_uuid: String,
    pub uuid4: String,
    pub token: String,
    pub hostname: String,
    pub generation: String,
    pub monotonic: Vec<f64>,
    pub armed: f64,
    pub waited: f64,
    pub timer: Timer,
}

/// When the witness's timer fired, and in which generation.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Timer {
    pub at: Option<f64>,
    pub generation: Option<String>,
}

impl Witness {
    /// What it says to a fork now.
    pub fn ask(client: &Client, fork: &str) -> Self {
        serde_json::from_str(&client.sh(fork, ASK)).expect("the witness speaks JSON")
    }

    /// What it says to a fork now, what it said to the fork's hook, and the machine id.
    pub fn all(client: &Client, fork: &str) -> (Self, Self, String) {
        let said = client.sh(fork, &format!("{ASK}; echo; cat /run/hook.json; echo; cat /etc/machine-id"));
        let lines: Vec<_> = said.lines().collect();
        let [now, hook, machine_id] = lines[..] else { panic!("three lines expected: {said}") };
        let parse = |line| serde_json::from_str(line).expect("the witness speaks JSON");
        (parse(now), parse(hook), machine_id.to_owned())
    }

    /// What it said to the fork's hook, before the fork was handed out.
    pub fn heard_by_hook(client: &Client, fork: &str) -> Self {
        serde_json::from_str(&client.sh(fork, "cat /run/hook.json")).expect("the witness speaks JSON")
    }
}

fn spec(name: &str, vcpus: u8) -> Value {
    let script = include_str!("witness.py").replace("TIMER_SECONDS", &TIMER_SECONDS.to_string());
    let mut spec = spec::debian(name);
    if vcpus > 1 {
        // The form in which distributions ship kernels.
        spec["kernel"] = json!(spec::guest_dir().join("kernel/vmlinuz"));
    }
    let more = json!({
        "vcpus": vcpus,
        "services": [["python3", "-c", script]],
        // A list: the shell of string commands is /bin/sh, which has no /dev/tcp.
        "ready": {"command": ["bash", "-c", format!("{ASK} >/run/ready.json")]},
        "on_fork": [["bash", "-c", format!("{ASK} >/run/hook.json")]],
        "env": {"FROM_TEMPLATE": "yes"},
    });
    let more = more.as_object().expect("an object").clone();
    spec.as_object_mut().expect("an object").extend(more);
    spec
}

/// Directories that all daemons of this process share, one after the other. Pools of earlier ones are forgotten.
pub fn settings() -> Settings {
    static SETTINGS: OnceLock<PathBuf> = OnceLock::new();
    let directory = SETTINGS.get_or_init(|| {
        let directory = std::env::var_os("FORKLING_TEST_STATE");
        directory.expect("FORKLING_TEST_STATE names a directory for templates; tests/run sets it").into()
    });
    for entry in std::fs::read_dir(directory.join("state/templates")).into_iter().flatten().flatten() {
        let _ = std::fs::remove_file(entry.path().join("pool.json"));
    }
    Settings::shared(directory)
}

/// Forks that may take long: an emulated host has one slow CPU for all of them.
pub fn forks(client: &Client, template: &str, count: u32) -> Vec<ForkInfo> {
    client.forks_with(&json!({"template": template, "count": count, "timeout_ms": 300_000}))
}

/// A daemon that has template `name`, built if it is not there yet.
pub fn daemon_with(name: &str) -> Daemon {
    let daemon = settings().start();
    ensure(&daemon, name);
    daemon
}

/// A daemon with the template of one vCPU.
pub fn daemon() -> Daemon {
    daemon_with(ONE)
}

/// Builds template `name` if it is not there yet.
pub fn ensure(daemon: &Daemon, name: &str) {
    if daemon.template(name).is_ok() {
        return;
    }
    let start = Instant::now();
    let built = daemon.build(&spec(name, if name == TWO { 2 } else { 1 }));
    if let Err(error) = &built.outcome {
        panic!("template {name} cannot be built: {error:?}\n{}\n{}", built.console, daemon.log());
    }
    println!("built {name} in {:.1} s", start.elapsed().as_secs_f64());
}
