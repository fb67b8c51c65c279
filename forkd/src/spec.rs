//! The template file of `forkling template build -f`: strict TOML, made into the API's request.
//!
//! ```toml
//! name = "python"
//! memory = "256 MiB"
//! root = "debian"
//! warm_up = ["python3 -c 'import json, ssl'"]
//! ready = { command = ["/usr/bin/true"] }
//! ready_timeout = "60 s"
//! ```

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;

use crate::api::types::{BuildTemplate, Command, Cpu, Payload, Ready, TemplateNetwork};

/// Why a template file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("cannot read {path}; check the path given to -f")]
    Read {
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// It is not TOML, or has a field that does not exist or has another type.
    #[error("{path} is not a template file: {message}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The parser's text, with line and column.
        message: String,
    },
    /// A size or duration is not one.
    #[error("{field} = {value:?} is not {expected}")]
    Quantity {
        /// Field.
        field: &'static str,
        /// Its text.
        value: String,
        /// What it should be.
        expected: &'static str,
    },
}

/// A number or a number with a unit.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Quantity {
    Number(u64),
    Text(String),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: Option<String>,
    #[serde(default)]
    payload: Payload,
    memory: Option<Quantity>,
    #[serde(default = "one")]
    vcpus: u8,
    #[serde(default)]
    cpu: Cpu,
    kernel: Option<String>,
    modules: Option<String>,
    root: Option<String>,
    #[serde(default)]
    cmdline: String,
    overlay: Option<Quantity>,
    #[serde(default)]
    warm_up: Vec<Command>,
    #[serde(default)]
    services: Vec<Command>,
    #[serde(default)]
    ready: Ready,
    ready_timeout: Option<Quantity>,
    #[serde(default)]
    on_fork: Vec<Command>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    network: TemplateNetwork,
}

fn one() -> u8 {
    1
}

/// Reads the file at `path`; paths in it are relative to its directory. `name` goes before the file's own.
pub fn read(path: &Path, name: Option<&str>) -> Result<BuildTemplate, Error> {
    let read = |source| Error::Read { path: path.to_owned(), source };
    let text = fs::read_to_string(path).map_err(read)?;
    let base = std::path::absolute(path).map_err(read)?;
    parse(&text, path, base.parent().unwrap_or(Path::new("/")), name)
}

fn parse(text: &str, path: &Path, base: &Path, name: Option<&str>) -> Result<BuildTemplate, Error> {
    let syntax = |message: String| Error::Syntax { path: path.to_owned(), message };
    let file: File = toml::from_str(text).map_err(|error| syntax(error.to_string()))?;
    let name = name.map(str::to_owned).or(file.name).ok_or_else(|| syntax("it has no name".to_owned()))?;
    let located = |value: Option<String>| value.map(|value| locate(base, &value));
    let memory = file.memory.map(|value| mebibytes("memory", &value)).transpose()?;
    let overlay = file.overlay.map(|value| mebibytes("overlay", &value)).transpose()?;
    let ready_timeout_ms =
        file.ready_timeout.map(|value| milliseconds("ready_timeout", &value)).transpose()?;
    Ok(BuildTemplate {
        name,
        payload: file.payload,
        kernel: located(file.kernel),
        modules: located(file.modules),
        root: match file.root.as_deref() {
            Some(RECIPE) => file.root,
            _ => located(file.root),
        },
        memory_mib: memory.unwrap_or(256),
        vcpus: file.vcpus,
        cpu: file.cpu,
        cmdline: file.cmdline,
        overlay_mib: overlay.unwrap_or(0),
        warm_up: file.warm_up,
        services: file.services,
        ready: file.ready,
        ready_timeout_ms,
        on_fork: file.on_fork,
        env: file.env,
        network: file.network,
    })
}

/// The root that is made by a built-in recipe.
pub const RECIPE: &str = "debian";

/// `value` as an absolute path.
pub fn locate(base: &Path, value: &str) -> String {
    let joined = base.join(value);
    std::path::absolute(&joined).unwrap_or(joined).to_string_lossy().into_owned()
}

/// A size in MiB: a number of MiB, or text with the unit MiB or GiB (short: M, G).
fn mebibytes(field: &'static str, value: &Quantity) -> Result<u32, Error> {
    scaled(value, &[("mib", 1), ("m", 1), ("gib", 1024), ("g", 1024)])
        .and_then(|mib| u32::try_from(mib).ok())
        .ok_or_else(|| quantity(field, value, "a number of MiB or a size such as \"512 MiB\" or \"2 GiB\""))
}

/// A duration in milliseconds: a number of seconds, or text with the unit ms, s or min.
fn milliseconds(field: &'static str, value: &Quantity) -> Result<u64, Error> {
    let parsed = match value {
        Quantity::Number(seconds) => seconds.checked_mul(1000),
        Quantity::Text(_) => scaled(value, &[("ms", 1), ("s", 1000), ("min", 60_000)]),
    };
    parsed.ok_or_else(|| {
        quantity(field, value, "a number of seconds or a duration such as \"500 ms\" or \"2 min\"")
    })
}

fn scaled(value: &Quantity, units: &[(&str, u64)]) -> Option<u64> {
    let text = match value {
        Quantity::Number(number) => return Some(*number),
        Quantity::Text(text) => text.trim().to_ascii_lowercase(),
    };
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let unit = text[digits..].trim();
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    text[..digits].parse::<u64>().ok()?.checked_mul(*factor)
}

fn quantity(field: &'static str, value: &Quantity, expected: &'static str) -> Error {
    let value = match value {
        Quantity::Number(number) => number.to_string(),
        Quantity::Text(text) => text.clone(),
    };
    Error::Quantity { field, value, expected }
}

#[cfg(test)]
mod tests;
