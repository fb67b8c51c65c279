//! A pool's settings on disk, beside its template: they outlive the daemon.

use std::{fs, io, path::Path, sync::Arc};

use super::keep;
use crate::{
    api::{error::chain, types::PoolSettings},
    durable,
    engine::Engine,
    template::Template,
};

/// File of a template directory that holds its pool's settings.
const FILE: &str = "pool.json";

/// Keeps the settings of a template's pool. What cannot be kept is said in the log, and holds until the daemon ends.
pub async fn write(template: &Arc<Template>, settings: PoolSettings) {
    let directory = template.dir().to_owned();
    let written = tokio::task::spawn_blocking(move || replace(&directory, &settings)).await;
    if let Ok(Err(error)) = written {
        tracing::warn!(template = template.name(), error = chain(&error), "the pool's settings are not kept");
    }
}

/// Gives every template the pool that it had when the daemon last ended.
pub fn resume(engine: &Arc<Engine>) {
    for template in engine.registry.templates() {
        match read(template.dir()) {
            Ok(None) => {}
            Ok(Some(settings)) => {
                if template.pool().configure(settings).start {
                    tokio::spawn(keep(engine.clone(), template));
                }
            }
            Err(error) => {
                let (name, error) = (template.name(), chain(&error));
                tracing::warn!(template = name, error, "the pool's settings are lost");
            }
        }
    }
}

fn replace(directory: &Path, settings: &PoolSettings) -> io::Result<()> {
    durable::replace(&directory.join(FILE), &serde_json::to_vec_pretty(settings)?)
}

fn read(directory: &Path) -> io::Result<Option<PoolSettings>> {
    let text = match fs::read(directory.join(FILE)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text?,
    };
    let settings: PoolSettings = serde_json::from_slice(&text)?;
    settings.check().map_err(io::Error::other)?;
    Ok(Some(settings))
}

#[cfg(test)]
mod tests;
