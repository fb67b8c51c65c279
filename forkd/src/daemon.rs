//! The daemon's start and end.

use std::{
    fs::{self, File},
    io,
    os::unix::{
        fs::{FileTypeExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context as _;
use rustix::fs::{FlockOperation, Mode, flock};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    admission,
    api::{self, Peer},
    config::{Args, Config},
    engine::Engine,
    limits::{self, SHUTDOWN_GRACE},
    pool, template, vsock, zygote,
};

/// Mode of the socket: its owner and its group may connect.
const SOCKET_MODE: u32 = 0o660;

/// Why the daemon cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another daemon has the socket or the state directory.
    #[error(
        "{path} is in use by another forkd; stop that one, or give this one its own --socket and --state-dir"
    )]
    InUse {
        /// What is in use.
        path: PathBuf,
    },
    /// Something that is no socket has the socket's name.
    #[error("{path} exists and is not a socket; remove it or give another --socket")]
    NotSocket {
        /// The name.
        path: PathBuf,
    },
    /// The kernel refused.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// The listening socket; its name goes with it.
struct Listener {
    socket: UnixListener,
    path: PathBuf,
    _lock: File,
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Serves until SIGTERM or SIGINT, then ends every process it started.
pub fn run(args: Args) -> anyhow::Result<()> {
    let config = Config::new(args)?;
    let _state_lock = lock(&config.state_dir.join("forkd.lock"), &config.state_dir)?;
    let listener = listen(&config.socket)?;
    let _sockets = vsock::sweep(&config.runtime_dir)
        .with_context(|| format!("cannot clear the sockets of forks in {}", config.runtime_dir.display()))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(limits::api_workers())
        .enable_all()
        .thread_name("forkd")
        .build()?;
    let engine = Engine::new(config)?;
    let outcome = runtime.block_on(serve(&engine, &listener));
    drop(listener);
    runtime.shutdown_timeout(SHUTDOWN_GRACE);
    engine.network.end();
    outcome
}

/// Serves as the net process of the daemon that started this one, until that one is gone.
pub fn run_net() -> anyhow::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .context("cannot ask to end with the daemon")?;
    std::env::set_current_dir("/").context("cannot change the working directory to /")?;
    forkling_net::run().context("the net process cannot serve; it is started by forkd only")
}

async fn serve(engine: &Arc<Engine>, listener: &Listener) -> anyhow::Result<()> {
    let socket = listener.socket.try_clone().context("cannot use the socket")?;
    let socket = tokio::net::UnixListener::from_std(socket).context("cannot use the socket")?;
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let service = api::router(engine.clone()).into_make_service_with_connect_info::<Peer>();
    tokio::spawn(admission::keep(engine.clone()));
    tokio::spawn(zygote::spare::keep(engine.clone()));
    pool::resume(engine);
    let opening = engine.clone();
    tokio::task::spawn_blocking(move || template::open_ahead(&opening));
    if engine.registry.templates().iter().any(|template| template.record.spec.has_nic()) {
        // Before the first fork asks for it; what fails now fails again then, and is told to who asks.
        let engine = engine.clone();
        tokio::spawn(async move { engine.network.start_for_forks(&engine.spawner).await });
    }
    if let Some(idle) = engine.config.idle_unload {
        tokio::spawn(template::unload_idle(engine.clone(), idle));
    }
    tracing::info!(socket = %listener.path.display(), max_forks = engine.max_forks, "ready");
    let outcome = tokio::select! {
        outcome = axum::serve(socket, service) => outcome.context("cannot serve the socket"),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    tracing::info!("ending");
    shut_down(engine).await;
    outcome
}

/// Ends every fork and zygote and waits for them.
async fn shut_down(engine: &Arc<Engine>) {
    engine.registry.close();
    engine.spawns.close();
    let forks = engine.registry.forks(None, true);
    for fork in &forks {
        fork.kill("shutdown", "the daemon ended");
    }
    let zygotes: Vec<_> =
        engine.registry.templates().iter().filter_map(|template| template.unload()).collect();
    let all = async {
        for fork in &forks {
            fork.buried().await;
        }
        for zygote in &zygotes {
            zygote.ended().await;
        }
    };
    if tokio::time::timeout(SHUTDOWN_GRACE, all).await.is_err() {
        tracing::warn!("some processes did not end in time; they end with this one");
    }
}

/// Binds the socket. A name that a killed daemon left is removed, one that is served is not.
fn listen(path: &Path) -> Result<Listener, Error> {
    let io = |action| move |source| Error::Io { action, path: path.to_owned(), source };
    let mut lock_name = path.as_os_str().to_owned();
    lock_name.push(".lock");
    let lock = lock(Path::new(&lock_name), path)?;
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(Error::NotSocket { path: path.to_owned() });
        }
        // Served without our lock: by a program that knows nothing of it.
        Ok(_) if UnixStream::connect(path).is_ok() => return Err(Error::InUse { path: path.to_owned() }),
        Ok(_) => fs::remove_file(path).map_err(io("remove the stale socket"))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io("inspect")(error)),
    }
    // From bind(2) on nobody else may connect; the group is let in after.
    let before = rustix::process::umask(Mode::from_raw_mode(0o177));
    let bound = UnixListener::bind(path);
    rustix::process::umask(before);
    let socket = bound.map_err(io("listen on"))?;
    let listener = Listener { socket, path: path.to_owned(), _lock: lock };
    fs::set_permissions(path, fs::Permissions::from_mode(SOCKET_MODE)).map_err(io("set the mode of"))?;
    listener.socket.set_nonblocking(true).map_err(io("listen on"))?;
    Ok(listener)
}

/// Takes a lock on `what` that ends with this process.
fn lock(path: &Path, what: &Path) -> Result<File, Error> {
    let open = |source| Error::Io { action: "open the lock file", path: path.to_owned(), source };
    let file = File::options().create(true).truncate(false).write(true).open(path).map_err(open)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::InUse { path: what.to_owned() }),
        Err(error) => Err(Error::Io { action: "lock", path: path.to_owned(), source: error.into() }),
    }
}

#[cfg(test)]
mod tests;
