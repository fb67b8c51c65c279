//! `forkling template ...`

use std::{path::PathBuf, process::ExitCode};

use axum::http::Method;

use super::{
    client::{Client, Events, Failure, json_body, segment},
    output::{Output, ago, mib, table},
    pool,
    progress::Progress,
};
use crate::{
    api::types::{BuildEvent, Residency, TemplateInfo, TemplateState, Templates},
    spec,
};

/// What to do with templates.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Build a template from a TOML file
    Build(Build),
    /// List the templates
    #[command(alias = "list")]
    Ls,
    /// Show a template
    Inspect {
        /// Its name
        name: String,
    },
    /// Remove templates
    Rm {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Unload templates without forks: their memory is free until the next fork
    Unload {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Load a template: a cold one ahead of its first fork, a broken one anew
    Reload {
        /// Its name
        name: String,
    },
}

/// A build.
#[derive(Debug, clap::Args)]
pub struct Build {
    /// The template file
    #[arg(short, long, default_value = "template.toml", value_name = "PATH")]
    file: PathBuf,
    /// Name of the template, instead of the file's
    #[arg(long)]
    name: Option<String>,
    /// Show the guest's console
    #[arg(long)]
    console: bool,
}

/// Runs a command.
pub async fn run(command: Command, client: &Client, output: Output) -> Result<ExitCode, Failure> {
    match command {
        Command::Build(build) => return build.run(client, output).await,
        Command::Ls => {
            let all: Templates = client.get("/v1/templates").await?;
            if output.json { output.print(&all) } else { list(&all) }
        }
        Command::Inspect { name } => {
            let info: TemplateInfo = client.get(&path(&name)).await?;
            if output.json { output.print(&info) } else { show(&info) }
        }
        Command::Rm { names } => {
            for name in &names {
                client.delete(&path(name)).await?;
            }
            if output.json {
                output.print(&serde_json::json!({ "removed": names }));
            }
        }
        Command::Unload { names } => {
            for name in &names {
                let info: TemplateInfo = client.post(&format!("{}/unload", path(name)), &()).await?;
                if output.json {
                    output.print(&info);
                }
            }
        }
        Command::Reload { name } => {
            let info: TemplateInfo = client.post(&format!("{}/reload", path(&name)), &()).await?;
            if output.json { output.print(&info) } else { show(&info) }
        }
    }
    Ok(ExitCode::SUCCESS)
}

impl Build {
    async fn run(self, client: &Client, output: Output) -> Result<ExitCode, Failure> {
        let spec = spec::read(&self.file, self.name.as_deref())
            .map_err(|error| Failure::Local(crate::api::error::chain(&error)))?;
        let response = client.send(Method::POST, "/v1/templates", json_body(Some(&spec)), &[]).await?;
        let mut events = Events::new(response);
        let progress = Progress::new(self.console);
        while let Some(event) = events.next::<BuildEvent>().await? {
            if output.json {
                output.print(&event);
            } else {
                progress.show(&event);
            }
            match event {
                BuildEvent::Done { template } => {
                    if !output.json {
                        println!("{}", template.name);
                    }
                    return Ok(ExitCode::SUCCESS);
                }
                BuildEvent::Error { error } => {
                    if !output.json {
                        output.error(&error);
                    }
                    return Ok(ExitCode::from(super::FAILED));
                }
                BuildEvent::Stage { .. } | BuildEvent::Console { .. } | BuildEvent::Save { .. } => {}
            }
        }
        progress.clear();
        Err(Failure::Broken("the daemon ended during the build".to_owned()))
    }
}

fn path(name: &str) -> String {
    format!("/v1/templates/{}", segment(name))
}

fn state(info: &TemplateInfo) -> &'static str {
    match info.state {
        TemplateState::Cold => "cold",
        TemplateState::Loading => "loading",
        TemplateState::Ready => "ready",
        TemplateState::Broken => "broken",
    }
}

fn list(all: &Templates) {
    let row = |info: &TemplateInfo| {
        vec![
            info.name.clone(),
            state(info).to_owned(),
            info.forks.to_string(),
            if info.pool.high == 0 {
                "-".to_owned()
            } else {
                format!("{}/{}", info.pool.parked, info.pool.target)
            },
            format!("{} MiB", info.spec.memory_mib),
            info.spec.vcpus.to_string(),
            info.resident_bytes.map_or_else(|| "-".to_owned(), mib),
            mib(info.disk_bytes),
            ago(info.created_unix_ms),
        ]
    };
    let rows: Vec<_> = all.templates.iter().map(row).collect();
    table(&["NAME", "STATE", "FORKS", "PARKED", "MEMORY", "VCPUS", "RESIDENT", "DISK", "AGE"], &rows);
}

fn show(info: &TemplateInfo) {
    println!("name      {}", info.name);
    println!("state     {}", state(info));
    if let Some(reason) = &info.reason {
        println!("reason    {reason}");
    }
    if let Some(parent) = &info.parent {
        println!("parent    fork {} of {}", parent.fork, parent.template);
    }
    println!("forks     {}", info.forks);
    println!("memory    {} MiB, {} vCPUs", info.spec.memory_mib, info.spec.vcpus);
    println!("resident  {}", info.resident_bytes.map_or_else(|| "not loaded".to_owned(), mib));
    if let Some(residency) = &info.residency {
        let Residency { loaded_chunks, data_chunks, demand_faults, zero_faults, fetch_ms, .. } = residency;
        let (chunks, pages) = (residency.prefetched_chunks, residency.prefetched_pages);
        println!("chunks    {loaded_chunks} of {data_chunks}; read ahead: {chunks} chunks, {pages} pages");
        println!("faults    {demand_faults} for chunks, {zero_faults} for zeros");
        println!("fetching  {fetch_ms:.1} ms");
    }
    let unique = info.disk_unique_bytes.map(|bytes| format!(", {} its own", mib(bytes))).unwrap_or_default();
    println!("disk      {}{unique}", mib(info.disk_bytes));
    println!("age       {}", ago(info.created_unix_ms));
    if let Some(pid) = info.zygote_pid {
        println!("zygote    {pid}");
    }
    pool::lines(&info.pool).iter().for_each(|(name, value)| println!("{name:<10}{value}"));
    println!("spec      {}", serde_json::to_string(&info.spec).expect("specs are JSON"));
}
