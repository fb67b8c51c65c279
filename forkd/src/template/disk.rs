//! Template directories: `STATE/templates/NAME/{template.json, snapshot/}`, complete or absent, with `pool.json` if it has ever had a pool.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use forkling_vmm::snapshot::{ChunkStore, Snapshot, file};
use serde::{Deserialize, Serialize};

use super::{Template, scratch};
use crate::{
    api::{
        error::{Code, Error, chain},
        types::{BuildTemplate, Parent, Payload, Ready, TemplateNetwork},
    },
    engine::Engine,
    names,
    registry::Registry,
};

/// File of a template directory that holds its [`Record`].
const RECORD: &str = "template.json";

/// Format of [`Record`].
const FORMAT: u32 = 1;

/// What is known of a template without opening its snapshot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    format: u32,
    /// When it was made: milliseconds since 1970.
    pub created_unix_ms: u64,
    /// The fork it is a snapshot of.
    pub parent: Option<Parent>,
    /// Bytes of its directory.
    pub disk_bytes: u64,
    /// What it was made from; its name is the directory's.
    pub spec: BuildTemplate,
}

impl Record {
    /// Of a template made now.
    pub fn new(spec: BuildTemplate, parent: Option<Parent>, directory: &Path) -> Self {
        let created_unix_ms = crate::fork::unix_ms();
        Self { format: FORMAT, created_unix_ms, parent, disk_bytes: bytes_below(directory), spec }
    }

    /// Of a template whose record cannot be read.
    pub fn unknown(name: &str) -> Self {
        let spec = BuildTemplate {
            name: name.to_owned(),
            payload: Payload::default(),
            kernel: None,
            modules: None,
            root: None,
            memory_mib: 0,
            vcpus: 0,
            cpu: crate::api::types::Cpu::default(),
            cmdline: String::new(),
            overlay_mib: 0,
            warm_up: Vec::new(),
            services: Vec::new(),
            ready: Ready::default(),
            ready_timeout_ms: None,
            on_fork: Vec::new(),
            env: std::collections::BTreeMap::new(),
            network: TemplateNetwork::default(),
        };
        Self { format: FORMAT, created_unix_ms: 0, parent: None, disk_bytes: 0, spec }
    }

    fn read(directory: &Path, name: &str) -> Result<Self, Error> {
        let path = directory.join(RECORD);
        let unusable = |cause: &dyn std::fmt::Display| {
            Error::new(Code::SnapshotInvalid, format!("{RECORD} of template {name} cannot be used"))
                .because(cause)
        };
        let text = fs::read(&path).map_err(|error| unusable(&error))?;
        let mut record: Self = serde_json::from_slice(&text).map_err(|error| unusable(&error))?;
        if record.format != FORMAT {
            return Err(unusable(&format_args!(
                "it has format {}, this build reads {FORMAT}",
                record.format
            )));
        }
        name.clone_into(&mut record.spec.name);
        Ok(record)
    }

    /// Writes it into a template directory, durably.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        use io::Write;
        let mut file = fs::File::create(directory.join(RECORD))?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        file.sync_all()
    }
}

/// Enters every template of `directory` into the registry and removes what unfinished work left there.
pub fn scan(registry: &Arc<Registry>, directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if scratch::is_scratch(name) {
            tracing::info!(name, "removing what an unfinished build or removal left");
            scratch::remove(&path);
        } else if names::validate(name).is_ok() && path.is_dir() {
            let template = match Record::read(&path, name) {
                Ok(record) => Template::new(record, path.clone()),
                Err(error) => Template::unreadable(name, path.clone(), error),
            };
            if let Ok(reservation) = registry.reserve(name) {
                reservation.fill(Arc::new(template));
            }
        }
    }
    Ok(())
}

/// Verifies the chunks of a finished snapshot and makes those that other templates have one file with theirs.
pub(super) async fn share_chunks(engine: &Arc<Engine>, snapshot: &Path) -> Result<(), Error> {
    let (engine, path) = (engine.clone(), snapshot.to_owned());
    let shared = tokio::task::spawn_blocking(move || engine.chunks.share(&Snapshot::open(&path)?));
    match shared.await.map_err(|error| Error::new(Code::Internal, "sharing chunks failed").because(error))? {
        Ok(sharing) => tracing::debug!(?sharing, "chunks shared"),
        Err(error) if error.is_snapshot_fault() => {
            return Err(Error::new(Code::BuildFailed, "the snapshot is damaged").because(chain(&error)));
        }
        // It is complete without.
        Err(error) => tracing::warn!(error = chain(&error), "a snapshot shares no chunks"),
    }
    Ok(())
}

/// Removes a template's directory: out of sight first, so that a crash leaves nothing half removed.
pub fn remove(engine: &Engine, template: &Template) -> Result<(), Error> {
    let chunks = ChunkStore::chunks_of(&template.snapshot_dir());
    let doomed = scratch::beside(template.dir());
    fs::rename(template.dir(), &doomed).map_err(|error| {
        let message = format!("the directory of template {} cannot be removed", template.name());
        Error::new(Code::Internal, message).because(error)
    })?;
    scratch::remove(&doomed);
    engine.chunks.release(&chunks);
    Ok(())
}

/// Bytes of a template that would be free if it were removed: its files that no other template has.
pub fn unique_bytes(template: &Template) -> u64 {
    // A chunk has one link in the store.
    let chunks = template.snapshot_dir().join(file::CHUNKS);
    let all = |directory: &Path, skip: &Path, links: u64| {
        sum_below(directory, skip, &|metadata| if metadata.nlink() <= links { metadata.len() } else { 0 })
    };
    all(template.dir(), &chunks, 1) + all(&chunks, Path::new(""), 2)
}

fn bytes_below(directory: &Path) -> u64 {
    sum_below(directory, Path::new(""), &|metadata| metadata.len())
}

/// Sum of `size` over all files below `directory`, but for those in `skip`.
fn sum_below(directory: &Path, skip: &Path, size: &dyn Fn(&fs::Metadata) -> u64) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    let of = |path: PathBuf| match fs::symlink_metadata(&path) {
        Ok(_) if path == skip => 0,
        Ok(metadata) if metadata.is_dir() => sum_below(&path, skip, size),
        Ok(metadata) => size(&metadata),
        Err(_) => 0,
    };
    entries.flatten().map(|entry| of(entry.path())).sum()
}
