//! Building a template: root image, initramfs, boot, freeze, save, commit, load.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use forkling_net::control::{Guest, Limits};
use forkling_proto::{
    config::{self, GuestConfig},
    network::TEMPLATE,
};
use forkling_vmm::{protocol::BuildSpec, snapshot::file};
use rustix::fs::{Mode, OFlags, open};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc},
    task::AbortHandle,
};

use super::{Record, Template, builder, disk, initramfs, modules, root, scratch::Scratch, validate};
use crate::{
    api::{
        error::{Code, Error, chain},
        types::{BuildEvent, BuildTemplate, Command, Payload, Ready},
    },
    engine::Engine,
    fork::{policy, unavailable},
    limits::{BOOT_TIMEOUT, DEFAULT_READY_TIMEOUT},
    network::{Bound, Link},
    registry::Reservation,
};

/// zstd level of the chunks: most of the gain for little of the time.
const COMPRESSION: i32 = 3;

/// Events that wait for a slow reader.
const EVENTS: usize = 256;

/// A build under way. Dropped, it is undone.
#[derive(Debug)]
pub struct Build {
    events: Option<mpsc::Receiver<BuildEvent>>,
    task: AbortHandle,
}

impl Build {
    /// What happens; the last event is [`BuildEvent::Done`] or [`BuildEvent::Error`].
    ///
    /// # Panics
    /// When called twice.
    pub fn take_events(&mut self) -> mpsc::Receiver<BuildEvent> {
        self.events.take().expect("taken once")
    }
}

impl Drop for Build {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What a build holds from its start to its end.
struct Job {
    engine: Arc<Engine>,
    spec: BuildTemplate,
    files: validate::Files,
    reservation: Reservation,
    events: mpsc::Sender<BuildEvent>,
    _permit: OwnedSemaphorePermit,
}

/// Checks `spec` and starts to build it.
pub fn start(engine: &Arc<Engine>, spec: BuildTemplate) -> Result<Build, Error> {
    let files = validate::validate(&spec, &engine.config)?;
    let reservation = engine.registry.reserve(&spec.name)?;
    let permit = engine.builds.clone().try_acquire_owned();
    let permit = permit.map_err(|_| Error::new(Code::TooManyBuilds, "other templates are being built"))?;
    let (sender, events) = mpsc::channel(EVENTS);
    let job =
        Job { engine: engine.clone(), spec, files, reservation, events: sender.clone(), _permit: permit };
    let task = tokio::spawn(async move {
        let last = match job.run().await {
            Ok(done) => done,
            Err(error) => BuildEvent::Error { error: error.body() },
        };
        let _ = sender.send(last).await;
    });
    Ok(Build { events: Some(events), task: task.abort_handle() })
}

impl Job {
    async fn run(self) -> Result<BuildEvent, Error> {
        let templates = self.engine.templates_dir();
        let scratch = Scratch::new(&templates).map_err(|error| write_error(&error))?;
        let directory = scratch.path().join("snapshot");
        fs::create_dir(&directory).map_err(|error| write_error(&error))?;
        if let Some(root) = &self.spec.root {
            self.stage("root").await;
            root::make(&self.engine, root, scratch.path(), &directory.join(file::ROOT)).await?;
        }
        self.stage("initramfs").await;
        let initramfs = self.initramfs(scratch.path()).await?;
        self.boot(&initramfs, &directory).await?;
        fs::remove_file(&initramfs).map_err(|error| write_error(&error))?;
        disk::share_chunks(&self.engine, &directory).await?;
        let template = self.commit(scratch, templates.join(&self.spec.name))?;
        let (engine, events) = (self.engine.clone(), self.events.clone());
        // Nothing is awaited between the commit and the registration, so that a cancelled build leaves neither.
        self.reservation.fill(template.clone());
        let _ = events.send(BuildEvent::Stage { stage: "load".to_owned() }).await;
        if let Err(error) = template.ready(&engine).await {
            delete(&engine, template.name()).await?;
            return Err(error);
        }
        Ok(BuildEvent::Done { template: Box::new(template.info(&engine)) })
    }

    async fn stage(&self, stage: &str) {
        let _ = self.events.send(BuildEvent::Stage { stage: stage.to_owned() }).await;
    }

    /// Writes the initramfs; empty for a null payload.
    async fn initramfs(&self, work: &Path) -> Result<PathBuf, Error> {
        let path = work.join("initramfs.cpio");
        let (out, agent) = (path.clone(), self.engine.config.agent.clone());
        let config = guest_config(&self.spec);
        let (tree, null) = (self.files.modules.clone(), self.spec.payload == Payload::Null);
        let network = self.spec.has_nic();
        let written = tokio::task::spawn_blocking(move || {
            let file = File::create(out).map_err(|error| write_error(&error))?;
            if null {
                return Ok(());
            }
            let modules = tree.map_or(Ok(Vec::new()), |tree| module_files(&tree, network))?;
            initramfs::write(io::BufWriter::new(file), &agent, &config, &modules).map_err(|error| {
                Error::new(Code::BuildFailed, "cannot write the initramfs").because(chain(&error))
            })
        });
        written
            .await
            .map_err(|error| Error::new(Code::Internal, "writing the initramfs failed").because(error))??;
        Ok(path)
    }

    async fn boot(&self, initramfs: &Path, directory: &Path) -> Result<(), Error> {
        let spec = &self.spec;
        let kernel = File::open(&self.files.kernel).map_err(|error| {
            let message = format!("the kernel {:?} cannot be read", self.files.kernel);
            Error::new(Code::FileNotFound, message).because(error)
        })?;
        let initramfs = File::open(initramfs).map_err(|error| write_error(&error))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let snapshot = open(directory, flags, Mode::empty()).map_err(|error| write_error(&error.into()))?;
        let root = match spec.root {
            Some(_) => Some(File::open(directory.join(file::ROOT)).map_err(|error| write_error(&error))?),
            None => None,
        };
        // The link lasts as long as the build.
        let wire = self.wire().await?;
        let build = BuildSpec {
            memory_mib: spec.memory_mib,
            vcpus: spec.vcpus,
            cpu: spec.cpu.into(),
            cmdline: spec.cmdline.clone(),
            root: root.is_some(),
            network: wire.is_some(),
            payload: spec.payload.into(),
            timeout_ms: millis(BOOT_TIMEOUT) + ready_timeout_ms(spec),
            compression: COMPRESSION,
        };
        let mut fds = vec![kernel.as_fd(), initramfs.as_fd(), snapshot.as_fd()];
        fds.extend(root.as_ref().map(AsFd::as_fd));
        fds.extend(wire.as_ref().map(|(_, frames)| frames.as_fd()));
        builder::run(&self.engine, build, &fds, &self.events).await
    }

    /// The wire of the guest that is built, which may reach what the template's forks may.
    async fn wire(&self) -> Result<Option<(Link, OwnedFd)>, Error> {
        if !self.spec.has_nic() {
            return Ok(None);
        }
        let network = &self.engine.network;
        network.start(&self.engine.spawner).await.map_err(|error| unavailable(&error))?;
        let (link, frames) = network.link().map_err(|error| unavailable(&error))?;
        let guest = Guest { id: format!("template {}", self.spec.name), ipv4: TEMPLATE, group: None };
        let policy = policy(&self.spec.network.egress)?;
        link.bind(Bound { guest, policy, limits: Limits::default() });
        Ok(Some((link, frames)))
    }

    fn commit(&self, scratch: Scratch, target: PathBuf) -> Result<Arc<Template>, Error> {
        let record = Record::new(self.spec.clone(), None, scratch.path());
        commit(record, scratch, target)
    }
}

/// Completes a template directory and gives it its name.
pub(super) fn commit(record: Record, scratch: Scratch, target: PathBuf) -> Result<Arc<Template>, Error> {
    record.write(scratch.path()).map_err(|error| write_error(&error))?;
    scratch.commit(&target).map_err(|error| {
        Error::new(Code::BuildFailed, "cannot commit the template").because(chain(&error))
    })?;
    Ok(Arc::new(Template::new(record, target)))
}

/// Removes a template and all of it. Refused while it has forks.
pub async fn delete(engine: &Arc<Engine>, name: &str) -> Result<(), Error> {
    let (template, reservation) = engine.registry.take_template(name)?;
    template.retire(engine);
    let engine = engine.clone();
    let removed = tokio::task::spawn_blocking(move || {
        let removed = super::remove(&engine, &template);
        // The name is free only when the directory is gone.
        match &removed {
            Ok(()) => drop(reservation),
            Err(_) => reservation.fill(template),
        }
        removed
    });
    removed
        .await
        .map_err(|error| Error::new(Code::Internal, "removing the template failed").because(error))?
}

fn guest_config(spec: &BuildTemplate) -> GuestConfig {
    let argvs = |commands: &[Command]| commands.iter().map(Command::argv).collect();
    GuestConfig {
        // Filled in by the initramfs writer.
        modules: Vec::new(),
        root: if spec.root.is_some() { config::Root::Pmem } else { config::Root::Initramfs },
        overlay_mib: spec.overlay_mib,
        warm_up: argvs(&spec.warm_up),
        services: argvs(&spec.services),
        ready: match &spec.ready {
            Ready::Immediately => config::Ready::Immediately,
            Ready::Forkpoint => config::Ready::Forkpoint,
            Ready::Command(command) => config::Ready::Command(command.argv()),
            Ready::Port(port) => config::Ready::Port(*port),
        },
        ready_timeout_ms: ready_timeout_ms(spec),
        on_fork: argvs(&spec.on_fork),
        network: spec.has_nic(),
        env: spec.env.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
    }
}

/// The module files the guest needs, in load order.
fn module_files(tree: &Path, network: bool) -> Result<Vec<PathBuf>, Error> {
    let fail = |cause: &dyn std::fmt::Display| {
        Error::new(Code::BuildRefused, format!("the kernel modules in {tree:?} cannot be used"))
            .because(cause)
    };
    let dependencies = fs::read_to_string(tree.join("modules.dep")).map_err(|error| fail(&error))?;
    // A kernel without built-in modules has no such list.
    let builtin = fs::read_to_string(tree.join("modules.builtin")).unwrap_or_default();
    let network: &[&str] = if network { &modules::NETWORK } else { &[] };
    let wanted: Vec<_> = modules::REQUIRED.iter().chain(network).copied().collect();
    let order = modules::load_order(&dependencies, &builtin, &wanted).map_err(|error| fail(&error))?;
    Ok(order.into_iter().map(|file| tree.join(file)).collect())
}

fn ready_timeout_ms(spec: &BuildTemplate) -> u64 {
    spec.ready_timeout_ms.unwrap_or(millis(DEFAULT_READY_TIMEOUT))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn write_error(error: &io::Error) -> Error {
    Error::new(Code::BuildFailed, "cannot write into the state directory").because(error)
}
