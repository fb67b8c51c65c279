//! Checks of a build spec that need no guest: all that can be refused is refused before anything is started.

use std::{fs, path::PathBuf};

use forkling_vmm::memory::layout::{MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB};

use super::root;
use crate::{
    api::{
        error::{Code, Error},
        types::{BuildTemplate, Command, Payload, Ready},
    },
    config::Config,
    fork::policy,
    limits::{HOST_RESERVE_MIB, MAX_CMDLINE, MAX_COMMANDS, MAX_ENV, MAX_TIMEOUT, host_available_mib},
    names,
};

/// The files a valid spec refers to.
#[derive(Debug)]
pub struct Files {
    /// Kernel, or the null guest's binary.
    pub kernel: PathBuf,
    /// `lib/modules/VERSION` of the kernel.
    pub modules: Option<PathBuf>,
}

/// Checks `spec` and finds its files.
pub fn validate(spec: &BuildTemplate, config: &Config) -> Result<Files, Error> {
    names::validate(&spec.name)
        .map_err(|error| Error::new(Code::InvalidName, "the template's name is not valid").because(error))?;
    machine(spec)?;
    commands(spec)?;
    environment(spec.env.iter())?;
    network(spec)?;
    if let Some(path) = &spec.root {
        if spec.payload == Payload::Null {
            return Err(invalid("a null payload has no root"));
        }
        absolute("root", path, path == crate::spec::RECIPE)?;
        root::check(path)?;
    }
    let kernel = kernel(spec, config)?;
    let modules = modules(spec, &kernel)?;
    Ok(Files { kernel, modules })
}

fn machine(spec: &BuildTemplate) -> Result<(), Error> {
    let memory = spec.memory_mib;
    if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&memory) {
        let message = format!("{memory} MiB is not between {MIN_MEMORY_MIB} and {MAX_MEMORY_MIB} MiB");
        return Err(Error::new(Code::MemoryOutOfRange, message));
    }
    if let Some(available) = host_available_mib()
        && u64::from(memory) + HOST_RESERVE_MIB > available
    {
        let message = format!(
            "{memory} MiB and a reserve of {HOST_RESERVE_MIB} MiB do not fit the host's {available} MiB"
        );
        return Err(Error::new(Code::MemoryExceedsHost, message));
    }
    if !(1..=MAX_VCPUS).contains(&spec.vcpus) {
        return Err(invalid(&format!("vcpus is {}, not between 1 and {MAX_VCPUS}", spec.vcpus)));
    }
    if spec.cmdline.len() > MAX_CMDLINE || spec.cmdline.contains(|c: char| c.is_control()) {
        return Err(invalid(&format!(
            "cmdline is longer than {MAX_CMDLINE} bytes or has control characters"
        )));
    }
    if spec.overlay_mib > memory {
        return Err(invalid("overlay_mib is larger than the memory it lies in"));
    }
    if spec.ready_timeout_ms.is_some_and(|ms| ms == 0 || u128::from(ms) > MAX_TIMEOUT.as_millis()) {
        return Err(invalid(&format!("ready_timeout_ms is not between 1 and {}", MAX_TIMEOUT.as_millis())));
    }
    if spec.ready == Ready::Port(0) {
        return Err(invalid("ready names port 0"));
    }
    Ok(())
}

fn commands(spec: &BuildTemplate) -> Result<(), Error> {
    let ready = match &spec.ready {
        Ready::Command(command) => std::slice::from_ref(command),
        Ready::Immediately | Ready::Forkpoint | Ready::Port(_) => &[],
    };
    let lists = [
        ("warm_up", &spec.warm_up[..]),
        ("services", &spec.services),
        ("on_fork", &spec.on_fork),
        ("ready", ready),
    ];
    for (field, list) in lists {
        if list.len() > MAX_COMMANDS {
            return Err(invalid(&format!("{field} has more than {MAX_COMMANDS} commands")));
        }
        if !list.iter().all(is_command) {
            return Err(invalid(&format!(
                "{field} has a command that is empty, too long, or has a zero byte"
            )));
        }
    }
    if spec.payload == Payload::Null && lists.iter().any(|(_, list)| !list.is_empty()) {
        return Err(invalid("a null payload runs no commands"));
    }
    Ok(())
}

fn is_command(command: &Command) -> bool {
    let argv = command.argv();
    let Some(program) = argv.first() else { return false };
    !program.is_empty() && argv.len() <= MAX_COMMANDS && argv.iter().all(|word| !word.contains('\0'))
}

/// Checks environment variables.
pub fn environment<'a>(env: impl Iterator<Item = (&'a String, &'a String)>) -> Result<(), Error> {
    let mut bytes = 0;
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(invalid(&format!(
                "env has {name:?}, which is not a variable, or a value with a zero byte"
            )));
        }
        bytes += name.len() + value.len();
    }
    if bytes > MAX_ENV {
        let message = format!("env has {bytes} bytes, more than {MAX_ENV}");
        return Err(Error::new(Code::EnvironmentTooLarge, message));
    }
    Ok(())
}

fn network(spec: &BuildTemplate) -> Result<(), Error> {
    if spec.payload == Payload::Null && spec.network.nic == Some(true) {
        return Err(invalid("a null payload has no NIC"));
    }
    if !spec.has_nic() && !spec.network.egress.is_empty() {
        let message = "the template has egress rules but no NIC";
        return Err(Error::new(Code::NoNetwork, message));
    }
    policy(&spec.network.egress).map(|_| ())
}

fn kernel(spec: &BuildTemplate, config: &Config) -> Result<PathBuf, Error> {
    let Some(given) = &spec.kernel else {
        if spec.payload == Payload::Linux && config.kernel.is_file() {
            return Ok(config.kernel.clone());
        }
        let message = format!("no kernel was given and {} is not there", config.kernel.display());
        return Err(Error::new(Code::KernelMissing, message));
    };
    absolute("kernel", given, false)?;
    let missing = |cause: &dyn std::fmt::Display| {
        Error::new(Code::FileNotFound, format!("the kernel {given:?} cannot be read")).because(cause)
    };
    let metadata = fs::metadata(given).map_err(|error| missing(&error))?;
    if metadata.is_file() { Ok(given.into()) } else { Err(missing(&"it is not a regular file")) }
}

/// The module tree: as given, else `modules/VERSION` beside the kernel if there is exactly one version.
fn modules(spec: &BuildTemplate, kernel: &std::path::Path) -> Result<Option<PathBuf>, Error> {
    if spec.payload == Payload::Null {
        return Ok(None);
    }
    if let Some(given) = &spec.modules {
        absolute("modules", given, false)?;
        let path = PathBuf::from(given);
        if path.join("modules.dep").is_file() {
            return Ok(Some(path));
        }
        let message =
            format!("{given:?} has no modules.dep; give the tree lib/modules/VERSION of the kernel");
        return Err(Error::new(Code::FileNotFound, message));
    }
    let Some(Ok(entries)) = kernel.parent().map(|parent| fs::read_dir(parent.join("modules"))) else {
        return Ok(None);
    };
    let mut trees =
        entries.flatten().map(|entry| entry.path()).filter(|path| path.join("modules.dep").is_file());
    match (trees.next(), trees.next()) {
        (Some(one), None) => Ok(Some(one)),
        _ => Ok(None),
    }
}

fn absolute(field: &str, path: &str, exempt: bool) -> Result<(), Error> {
    if exempt || (path.starts_with('/') && !path.contains('\0')) {
        return Ok(());
    }
    Err(invalid(&format!("{field} is {path:?}, not an absolute path")))
}

fn invalid(message: &str) -> Error {
    Error::new(Code::InvalidRequest, message)
}

#[cfg(test)]
mod tests;
