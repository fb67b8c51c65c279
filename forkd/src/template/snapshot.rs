//! A template made of a running fork: the second generation.

use std::{fs, path::Path, sync::Arc};

use forkling_proto::rpc::Kind;
use forkling_vmm::snapshot::file;
use rustix::fs::{Mode, OFlags, open};
use tokio::time::timeout;

use super::{
    Record, Template,
    build::{commit, write_error},
    disk,
    scratch::Scratch,
};
use crate::{
    agent,
    api::{
        error::{Code, Error, chain},
        types::{Parent, Payload},
    },
    engine::Engine,
    fork::{Fork, SaveError},
    limits::SNAPSHOT_TIMEOUT,
};

/// Saves `fork` as template `name`. The fork goes on, with the same id and a new generation.
pub async fn take(engine: &Arc<Engine>, fork: &Arc<Fork>, name: &str) -> Result<Arc<Template>, Error> {
    if let Some(error) = fork.death_error() {
        return Err(error);
    }
    let reservation = engine.registry.reserve(name)?;
    let templates = engine.templates_dir();
    let scratch = Scratch::new(&templates).map_err(|error| write_error(&error))?;
    let directory = scratch.path().join("snapshot");
    fs::create_dir(&directory).map_err(|error| write_error(&error))?;
    if fork.template.record.spec.root.is_some() {
        link_root(&fork.template.snapshot_dir(), &directory)?;
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let snapshot = open(&directory, flags, Mode::empty()).map_err(|error| write_error(&error.into()))?;
    let saved = timeout(SNAPSHOT_TIMEOUT, fork.save(&snapshot, engine.generation()?, freeze(fork))).await;
    let late =
        || Error::new(Code::SnapshotFailed, format!("fork {} did not reach a forkpoint in time", fork.id));
    if let Err(error) = saved.map_err(|_| late())? {
        return Err(fork.explain(of_save(fork, error)).await);
    }
    disk::share_chunks(engine, &directory).await?;
    let mut spec = fork.template.record.spec.clone();
    name.clone_into(&mut spec.name);
    let parent = Parent { template: fork.template.name().to_owned(), fork: fork.id.clone() };
    let record = Record::new(spec, Some(parent), scratch.path());
    let template = commit(record, scratch, templates.join(name))?;
    reservation.fill(template.clone());
    Ok(template)
}

/// Has the agent go to a forkpoint; a null guest goes there by itself.
async fn freeze(fork: &Arc<Fork>) -> Result<(), Error> {
    if fork.template.record.spec.payload == Payload::Null {
        return Ok(());
    }
    let lost = |error: agent::Error| {
        Error::new(Code::AgentUnreachable, format!("the agent of fork {} did not freeze", fork.id))
            .because(chain(&error))
    };
    // A connection of its own, which ends here: none is open for long in the new template.
    let connection = fork.connect_agent().await?;
    connection.round_trip(Kind::Freeze).await.map_err(lost)
}

/// Images never change, so that templates can share one.
fn link_root(from: &Path, to: &Path) -> Result<(), Error> {
    let (from, to) = (from.join(file::ROOT), to.join(file::ROOT));
    fs::hard_link(&from, &to)
        .or_else(|_| fs::copy(&from, &to).map(|_| ()))
        .map_err(|error| write_error(&error))
}

fn of_save(fork: &Fork, error: SaveError) -> Error {
    match error {
        SaveError::Guest(error) => error,
        error @ (SaveError::Failed(_) | SaveError::Control(_) | SaveError::Io(_)) => {
            Error::new(Code::SnapshotFailed, format!("fork {} could not be saved", fork.id))
                .because(chain(&error))
        }
    }
}
