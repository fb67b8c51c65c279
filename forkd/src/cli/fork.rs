//! `forkling fork`, `ps`, `kill`, `inspect`, `snapshot`.

use std::{collections::BTreeMap, process::ExitCode};

use axum::http::{Method, header};

use super::{
    FAILED,
    client::{Client, Events, Failure, json_body, segment},
    output::{Output, ago, mib, ms, table},
};
use crate::api::types::{
    self, ConsoleAnswer, CreateForks, ForkEvent, ForkInfo, ForkMemory, ForkResult, ForkState, Forks, Killed,
    NextIdentity, ResetFork, SnapshotFork, TemplateInfo,
};

/// `NAME=VALUE`.
pub fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is not NAME=VALUE"))?;
    Ok((name.to_owned(), value.to_owned()))
}

/// Options of new forks.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Options {
    /// Environment of every command in it
    #[arg(short, long = "env", value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Host name in the guest
    #[arg(long)]
    hostname: Option<String>,
    /// Kept with it and shown with it
    #[arg(long, value_name = "KEY=VALUE", value_parser = variable)]
    metadata: Vec<(String, String)>,
    /// Longest time to its acknowledgement in milliseconds
    #[arg(long, value_name = "MS")]
    create_timeout: Option<u64>,
    /// Whether parked forks may serve
    #[arg(long, value_enum, default_value_t)]
    pool: PoolUse,
    #[command(flatten)]
    network: super::network::Options,
}

/// See [`types::PoolUse`].
#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
enum PoolUse {
    /// If there are any
    #[default]
    Use,
    /// No: every fork is made from nothing
    Bypass,
}

impl Options {
    /// The request for forks of `template`.
    pub fn request(self, template: String) -> CreateForks {
        CreateForks {
            template,
            env: self.env.into_iter().collect(),
            hostname: self.hostname,
            metadata: self.metadata.into_iter().collect::<BTreeMap<_, _>>(),
            timeout_ms: self.create_timeout,
            pool: match self.pool {
                PoolUse::Use => types::PoolUse::Use,
                PoolUse::Bypass => types::PoolUse::Bypass,
            },
            network: self.network.request(),
            ..CreateForks::default()
        }
    }
}

/// Makes forks.
#[derive(Debug, clap::Args)]
pub struct Create {
    /// Of which template
    template: String,
    /// How many
    #[arg(short = 'n', long, default_value_t = 1)]
    count: u32,
    /// Its name; several are NAME-0, NAME-1 and so on
    #[arg(long)]
    name: Option<String>,
    /// A number for the guest
    #[arg(long, default_value_t = 0)]
    param: u64,
    /// Print each as soon as it is ready; an interrupt ends the making of the others
    #[arg(long)]
    stream: bool,
    #[command(flatten)]
    options: Options,
}

impl Create {
    /// Runs it.
    pub async fn run(self, client: &Client, output: Output) -> Result<ExitCode, Failure> {
        let mut request = self.options.request(self.template);
        request.count = Some(self.count);
        request.param = self.param;
        request.name_prefix = self.name;
        let mut failed = false;
        if self.stream {
            let headers = [(header::ACCEPT, "application/x-ndjson")];
            let response =
                client.send(Method::POST, "/v1/forks", json_body(Some(&request)), &headers).await?;
            let mut events = Events::new(response);
            while let Some(event) = events.next::<ForkEvent>().await? {
                if output.json {
                    output.print(&event);
                }
                failed |= show_result(&event.result, output);
            }
        } else {
            let results: Vec<ForkResult> = client.post("/v1/forks", &request).await?;
            if output.json {
                output.print(&results);
            }
            for result in &results {
                failed |= show_result(result, output);
            }
        }
        Ok(if failed { ExitCode::from(FAILED) } else { ExitCode::SUCCESS })
    }
}

/// Prints a child for people. Returns whether there is none.
fn show_result(result: &ForkResult, output: Output) -> bool {
    match result {
        ForkResult::Fork(fork) if !output.json => println!("{}", fork.id),
        ForkResult::Error(error) if !output.json => output.error(error),
        ForkResult::Fork(_) | ForkResult::Error(_) => {}
    }
    matches!(result, ForkResult::Error(_))
}

/// Lists forks.
#[derive(Debug, clap::Args)]
pub struct Ps {
    /// Of this template only
    #[arg(short, long)]
    template: Option<String>,
    /// Dead ones too
    #[arg(short, long)]
    all: bool,
}

impl Ps {
    /// Runs it.
    pub async fn run(self, client: &Client, output: Output) -> Result<ExitCode, Failure> {
        let forks: Forks = client.get(&query("/v1/forks", self.template.as_deref(), self.all)).await?;
        if output.json {
            output.print(&forks);
            return Ok(ExitCode::SUCCESS);
        }
        let row = |fork: &ForkInfo| {
            vec![
                fork.id.clone(),
                fork.name.clone().unwrap_or_else(|| "-".to_owned()),
                fork.template.clone(),
                state(fork).to_owned(),
                if fork.parked { "yes" } else { "no" }.to_owned(),
                fork.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
                ago(fork.created_unix_ms),
                fork.timings_us.map_or_else(|| "-".to_owned(), |timings| ms(timings.total)),
            ]
        };
        let rows: Vec<_> = forks.forks.iter().map(row).collect();
        table(&["ID", "NAME", "TEMPLATE", "STATE", "PARKED", "PID", "AGE", "MADE IN"], &rows);
        Ok(ExitCode::SUCCESS)
    }
}

/// Kills forks.
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("which").required(true).multiple(false))]
pub struct Kill {
    /// Their ids or names
    #[arg(group = "which", value_name = "ID")]
    ids: Vec<String>,
    /// All there are
    #[arg(long, group = "which")]
    all: bool,
    /// All of this template
    #[arg(short, long, group = "which")]
    template: Option<String>,
}

impl Kill {
    /// Runs it.
    pub async fn run(self, client: &Client, output: Output) -> Result<ExitCode, Failure> {
        let killed = if self.ids.is_empty() {
            client
                .delete_many::<Killed>(&query("/v1/forks", self.template.as_deref(), self.all))
                .await?
                .killed
        } else {
            for id in &self.ids {
                client.delete(&format!("/v1/forks/{}", segment(id))).await?;
            }
            self.ids
        };
        if output.json {
            output.print(&Killed { killed });
        } else {
            killed.iter().for_each(|id| println!("{id}"));
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Shows a fork.
#[derive(Debug, clap::Args)]
pub struct Inspect {
    /// Its id or name
    id: String,
}

impl Inspect {
    /// Runs it.
    pub async fn run(self, client: &Client, output: Output) -> Result<ExitCode, Failure> {
        let path = format!("/v1/forks/{}", segment(&self.id));
        let fork: ForkInfo = client.get(&path).await?;
        let console: ConsoleAnswer = client.get(&format!("{path}/console")).await?;
        // The dead have none, and a daemon that may not measure has other answers.
        let memory: Option<ForkMemory> = client.get(&format!("{path}/memory")).await.ok();
        if output.json {
            output.print(&serde_json::json!({ "fork": fork, "memory": memory, "console": console }));
        } else {
            show(&fork, memory.as_ref(), &console);
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn show(fork: &ForkInfo, memory: Option<&ForkMemory>, console: &ConsoleAnswer) {
    println!("id          {}", fork.id);
    if let Some(name) = &fork.name {
        println!("name        {name}");
    }
    println!("template    {}", fork.template);
    println!("state       {}", state(fork));
    if let Some(death) = &fork.death {
        println!("died        {} ({})", death.message, death.reason);
    }
    println!("hostname    {}", fork.hostname);
    println!("machine id  {}", fork.machine_id);
    println!("generation  {}", fork.generation);
    if let Some(pid) = fork.pid {
        println!("process     {pid}");
    }
    println!("age         {}", ago(fork.created_unix_ms));
    if fork.parked {
        println!("parked      it came out of the pool");
    }
    if let Some(memory) = memory {
        show_memory(memory);
    }
    for (key, value) in &fork.metadata {
        println!("metadata    {key}={value}");
    }
    if let Some(t) = &fork.timings_us {
        println!("made in     {}", ms(t.total));
        let phases = [
            ("queue", t.queue),
            ("fork", t.fork),
            ("vm", t.vm),
            ("vcpus", t.vcpus),
            ("restore", t.restore),
            ("activate", t.activate),
            ("enter", t.enter),
            ("guest", t.guest),
            ("reply", t.reply),
        ];
        for (name, micros) in phases {
            println!("  {name:<9} {}", ms(micros));
        }
    }
    const SHOWN: usize = 20;
    let lines: Vec<&str> = console.text.lines().collect();
    if !lines.is_empty() {
        println!("console");
    }
    for line in &lines[lines.len().saturating_sub(SHOWN)..] {
        println!("  {line}");
    }
}

fn show_memory(memory: &ForkMemory) {
    println!("memory      {} of guest", mib(memory.guest_bytes));
    let parts = [
        ("shared", memory.shared_bytes, "of the image, in its page tables"),
        ("private", memory.private_bytes, "of the image, copied or written"),
        ("overhead", memory.overhead_bytes, "beside the guest:"),
        ("  process", memory.vmm_private_bytes, ""),
        ("  tables", memory.page_table_bytes, "page tables"),
        ("  stacks", memory.kernel_stack_bytes, "of the kernel"),
    ];
    for (name, bytes, what) in parts {
        let kib = format!("{} KiB", bytes >> 10);
        println!("{}", format!("  {name:<9} {kib:>11}  {what}").trim_end());
    }
    println!(
        "holds       {} threads, {} descriptors, {} of them sockets",
        memory.threads, memory.descriptors, memory.sockets
    );
}

/// Makes a template of a fork.
#[derive(Debug, clap::Args)]
pub struct Snapshot {
    /// Its id or name
    id: String,
    /// Name of the new template
    name: String,
}

impl Snapshot {
    /// Runs it.
    pub async fn run(self, client: &Client, output: Output) -> Result<ExitCode, Failure> {
        let path = format!("/v1/forks/{}/snapshot", segment(&self.id));
        let template: TemplateInfo = client.post(&path, &SnapshotFork { name: self.name }).await?;
        if output.json {
            output.print(&template)
        } else {
            println!("{}", template.name)
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// A fork to reset.
#[derive(Debug, clap::Args)]
pub struct Reset {
    /// Its id or name
    id: String,
    /// Give it another machine id
    #[arg(long)]
    new_identity: bool,
    /// Give the memory of pages it wrote back, instead of keeping up to 32 MiB for the next time
    #[arg(long)]
    drop_writes: bool,
}

impl Reset {
    /// Runs it.
    pub async fn run(self, client: &Client, output: Output) -> Result<ExitCode, Failure> {
        let path = format!("/v1/forks/{}/reset", segment(&self.id));
        let identity = if self.new_identity { NextIdentity::New } else { NextIdentity::Same };
        let request = ResetFork { identity, keep_writes: !self.drop_writes, timeout_ms: None };
        let fork: ForkInfo = client.post(&path, &request).await?;
        if output.json {
            output.print(&fork)
        } else {
            println!("{}", fork.id)
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn state(fork: &ForkInfo) -> &'static str {
    match fork.state {
        ForkState::Creating => "creating",
        ForkState::Running => "running",
        ForkState::Died => "died",
    }
}

fn query(path: &str, template: Option<&str>, all: bool) -> String {
    let mut parameters = Vec::new();
    if let Some(template) = template {
        parameters.push(format!("template={}", segment(template)));
    }
    if all {
        parameters.push("all=true".to_owned());
    }
    if parameters.is_empty() { path.to_owned() } else { format!("{path}?{}", parameters.join("&")) }
}
