//! The daemon under measurement, with one template and one kept connection.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use forkling_fixtures::null_guest;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    client::{Connection, Reply, request},
    daemon::{Daemon, wait_gone},
};

/// Name of the template.
pub const TEMPLATE: &str = "bench";

/// Guest memory in MiB.
pub const MEMORY_MIB: u64 = 256;

/// What runs in the guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Guest {
    /// The null guest: a few instructions in user mode.
    Null,
    /// Debian with Python.
    Debian,
}

impl Guest {
    /// As in figure ids.
    pub fn name(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Debian => "debian",
        }
    }
}

/// Where things are.
#[derive(Clone, Debug)]
pub struct Places {
    /// Directory of `forkd`, `forkling-vmm`, `forkling-agent`.
    pub programs: PathBuf,
    /// Directory of `kernel/vmlinux`, `kernel/modules` and `root-debian.erofs`.
    pub artifacts: PathBuf,
    /// QEMU and what it needs, for its guests as baselines.
    pub qemu: Option<PathBuf>,
    /// Where state directories are made; of a disk, if cold starts are to mean anything.
    pub scratch: PathBuf,
}

/// Which forks a request is served with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// From the pool, if it has one.
    Pool,
    /// Made anew.
    New,
}

/// A fork, from the daemon's answer.
#[derive(Clone, Debug)]
pub struct Fork {
    /// Its id.
    pub id: String,
    /// Its process.
    pub pid: i32,
    /// Unique among all activations.
    pub generation: u64,
    /// Whether it was parked when it was asked for.
    pub parked: bool,
    /// Phases in microseconds by name.
    pub timings: serde_json::Map<String, Value>,
}

impl Fork {
    /// Whether its process was there when it was asked for.
    pub fn had_process(&self) -> bool {
        self.timings.get("fork").and_then(Value::as_f64) == Some(0.0)
    }
}

/// The daemon under measurement.
#[derive(Debug)]
pub struct Bench {
    /// The kept connection.
    pub connection: Connection,
    /// The daemon.
    pub daemon: Daemon,
    /// What runs in the guests.
    pub guest: Guest,
    /// Whether this build has pools.
    pub pools: bool,
    /// Whether it can ask an agent for a sign of life.
    pub pings: bool,
    /// Whether waiting takes no time.
    pub lab: bool,
    /// Milliseconds of the stages of the template's build, in order.
    pub stages: Vec<(String, f64)>,
    /// A fork that lives on, because the first VM of a host pays for all.
    companion: Option<Fork>,
    programs: PathBuf,
    // Dropped after the daemon.
    directory: TempDir,
}

impl Bench {
    /// Starts a daemon and builds its template.
    pub fn start(places: &Places, guest: Guest, lab: bool) -> anyhow::Result<Self> {
        // In /tmp whatever the scratch directory is: socket paths are short.
        let directory = tempfile::Builder::new().prefix("forkling-bench-").tempdir_in(&places.scratch)?;
        let run = directory.path();
        let daemon = Daemon::start(&places.programs, &run.join("state"), run, &[])?;
        let connection = daemon.connect()?;
        let mut bench = Self {
            connection,
            daemon,
            guest,
            pools: false,
            pings: false,
            lab,
            stages: Vec::new(),
            companion: None,
            programs: places.programs.clone(),
            directory,
        };
        bench.build(places).with_context(|| format!("forkd's log ends with:\n{}", bench.daemon.log()))?;
        bench.complete()?;
        bench.pools = bench.get_pool()?.is_some();
        let ping = bench.connection.exchange(&request("POST", "/v1/forks/none/ping", None))?;
        bench.pings = ping.json()?["error"]["code"] != "no_such_route";
        Ok(bench)
    }

    fn build(&mut self, places: &Places) -> anyhow::Result<()> {
        let spec = self.spec(&places.artifacts)?;
        let mut began = std::time::Instant::now();
        let mut stages: Vec<(String, f64)> = Vec::new();
        let mut outcome = None;
        self.connection.lines("POST", "/v1/templates", Some(&spec), |event| {
            let kind = event["event"].as_str().unwrap_or_default().to_owned();
            if let Some((_, took)) = stages.last_mut().filter(|_| kind != "console" && kind != "save") {
                *took = began.elapsed().as_secs_f64() * 1e3;
            }
            match kind.as_str() {
                "stage" => {
                    began = std::time::Instant::now();
                    stages.push((event["stage"].as_str().unwrap_or_default().to_owned(), 0.0));
                }
                "done" | "error" => outcome = Some((kind == "done", event)),
                _ => {}
            }
            Ok(())
        })?;
        self.stages = stages;
        match outcome {
            Some((true, _)) => Ok(()),
            Some((false, event)) => bail!("the template cannot be built: {}", event["error"]),
            None => bail!("the daemon ended during the build"),
        }
    }

    fn spec(&self, artifacts: &Path) -> anyhow::Result<Value> {
        Ok(match self.guest {
            Guest::Null => {
                let program = self.directory.path().join("null.bin");
                fs::write(&program, null_guest::PROGRAM)?;
                json!({"name": TEMPLATE, "payload": "null", "kernel": program, "memory_mib": MEMORY_MIB})
            }
            Guest::Debian => json!({
                "name": TEMPLATE,
                "memory_mib": MEMORY_MIB,
                "kernel": artifacts.join("kernel/vmlinux"),
                "root": artifacts.join("root-debian.erofs"),
                "warm_up": [["python3", "-c", "import secrets"]],
            }),
        })
    }

    /// Lets a fork run what is measured, and waits until all of the image is in memory.
    pub fn complete(&mut self) -> anyhow::Result<()> {
        let fork = self.fork(Source::Pool)?.1;
        if self.guest == Guest::Debian {
            self.exec(&fork, &["python3", "-c", "print(1+1)"])?;
        }
        self.destroy(&fork)?;
        let path = format!("/v1/templates/{TEMPLATE}");
        let mut before = None;
        loop {
            thread::sleep(Duration::from_millis(300));
            let now = self.connection.call("GET", &path, None)?["resident_bytes"].as_u64();
            if now == before {
                return Ok(());
            }
            before = now;
        }
    }

    /// The body of a request for forks.
    pub fn fork_body(&self, source: Source, count: usize) -> Value {
        let mut body = json!({"template": TEMPLATE});
        if count != 1 {
            body["count"] = count.into();
        }
        if self.pools && source == Source::New {
            body["pool"] = "bypass".into();
        }
        body
    }

    /// Asks for one fork; milliseconds from the request to its answer.
    pub fn fork(&mut self, source: Source) -> anyhow::Result<(f64, Fork)> {
        let request = request("POST", "/v1/forks", Some(&self.fork_body(source, 1)));
        let (took, reply) = self.connection.timed(&request)?;
        let fork = forks(&reply)?.pop().context("no fork in the answer")?;
        Ok((took.as_secs_f64() * 1e3, fork?))
    }

    /// Asks for `count` forks in requests as large as are allowed; all have to be made.
    pub fn fork_many(&mut self, source: Source, count: usize) -> anyhow::Result<Vec<Fork>> {
        let mut all = Vec::with_capacity(count);
        while all.len() < count {
            let piece = (count - all.len()).min(1000);
            let request = request("POST", "/v1/forks", Some(&self.fork_body(source, piece)));
            let made = forks(&self.connection.exchange(&request)?)?;
            all.extend(made.into_iter().collect::<anyhow::Result<Vec<_>>>()?);
        }
        Ok(all)
    }

    /// Kills a fork and waits until its process is gone and the host quiet.
    pub fn destroy(&mut self, fork: &Fork) -> anyhow::Result<()> {
        self.connection.call("DELETE", &format!("/v1/forks/{}", fork.id), None)?;
        ensure!(wait_gone(fork.pid, Duration::from_secs(60))?, "fork {} does not end", fork.id);
        self.quiet();
        Ok(())
    }

    /// Kills all forks and waits until they are gone; the companion is made anew.
    pub fn destroy_all(&mut self) -> anyhow::Result<()> {
        let listed = self.connection.call("GET", "/v1/forks", None)?;
        let pids: Vec<_> = listed["forks"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|fork| fork["pid"].as_i64())
            .collect();
        self.connection.call("DELETE", "/v1/forks?all=true", None)?;
        for pid in pids {
            ensure!(wait_gone(pid as i32, Duration::from_secs(60))?, "process {pid} does not end");
        }
        self.quiet();
        self.companion.take().map_or(Ok(()), |_| self.accompany())
    }

    /// Lets what follows the end of a VM happen; on one emulated CPU it would count as the next fork's.
    pub fn quiet(&self) {
        if self.lab {
            thread::sleep(Duration::from_millis(300));
        }
    }

    /// Runs a command that has to succeed; its standard output.
    pub fn exec(&mut self, fork: &Fork, argv: &[&str]) -> anyhow::Result<String> {
        let path = format!("/v1/forks/{}/exec", fork.id);
        let answer = self.connection.call("POST", &path, Some(&json!({"argv": argv})))?;
        ensure!(answer["exit_code"] == 0, "{argv:?} in fork {}: {answer}", fork.id);
        Ok(answer["stdout"].as_str().unwrap_or_default().to_owned())
    }

    /// Makes the companion, unless there is one.
    pub fn accompany(&mut self) -> anyhow::Result<()> {
        if self.companion.is_none() {
            self.companion = Some(self.fork(Source::New)?.1);
        }
        Ok(())
    }

    /// Waits until the daemon has no process but the zygote, the living forks and the parked ones.
    pub fn settle(&mut self) -> anyhow::Result<()> {
        let mut last = (0, 0);
        for _ in 0..300 {
            let living =
                self.connection.call("GET", "/v1/health", None)?["forks"].as_u64().unwrap_or_default();
            let pool = self.get_pool()?.unwrap_or_default();
            let parked = ["parked", "building"].iter().filter_map(|name| pool[name].as_u64()).sum::<u64>();
            last = (1 + living + parked, self.daemon.children().len() as u64);
            if last.0 == last.1 {
                self.quiet();
                return Ok(());
            }
            thread::sleep(Duration::from_millis(100));
        }
        bail!("the daemon should have {} processes and has {}", last.0, last.1)
    }

    /// Processes of the daemon that are neither its zygote nor living forks.
    pub fn parked_pids(&mut self) -> anyhow::Result<Vec<i32>> {
        let template = self.connection.call("GET", &format!("/v1/templates/{TEMPLATE}"), None)?;
        let forks = self.connection.call("GET", "/v1/forks", None)?;
        let forks = forks["forks"].as_array().into_iter().flatten().filter_map(|fork| fork["pid"].as_i64());
        let others: Vec<i64> = template["zygote_pid"].as_i64().into_iter().chain(forks).collect();
        let parked = self.daemon.children().into_iter().filter(|&pid| !others.contains(&i64::from(pid)));
        Ok(parked.collect())
    }

    /// Restarts the daemon over the same templates, with these options.
    pub fn restart(self, options: &[&str]) -> anyhow::Result<Self> {
        let Self { connection, daemon, guest, pools, pings, lab, stages, companion: _, programs, directory } =
            self;
        drop(connection);
        daemon.end()?;
        let run = directory.path();
        let daemon = Daemon::start(&programs, &run.join("state"), run, options)?;
        let connection = daemon.connect()?;
        Ok(Self {
            connection,
            daemon,
            guest,
            pools,
            pings,
            lab,
            stages,
            companion: None,
            programs,
            directory,
        })
    }
}

/// The forks of an answer, each made or not.
pub fn forks(reply: &Reply) -> anyhow::Result<Vec<anyhow::Result<Fork>>> {
    ensure!(reply.is_success(), "no forks: {}", reply.text());
    let answer = reply.json()?;
    let results = answer.as_array().context("the answer is no list")?;
    Ok(results.iter().map(fork_of).collect())
}

fn fork_of(result: &Value) -> anyhow::Result<Fork> {
    let fork = &result["fork"];
    let missing = || format!("not a fork: {result}");
    ensure!(fork["state"] == "running", "{}", missing());
    Ok(Fork {
        id: fork["id"].as_str().with_context(missing)?.to_owned(),
        pid: i32::try_from(fork["pid"].as_i64().with_context(missing)?)?,
        generation: fork["generation"].as_u64().with_context(missing)?,
        parked: fork["parked"].as_bool().unwrap_or(false),
        timings: fork["timings_us"].as_object().cloned().unwrap_or_default(),
    })
}
