//! Verbs about the daemon itself.

use axum::{Json, extract::State, serve::IncomingStream};
use tokio::net::UnixListener;

use super::{
    Shared,
    error::{Code, Error, ErrorAnswer},
    types::{Health, Version},
};

/// Who is at the other end of a connection.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// User id, if the kernel told.
    pub uid: Option<u32>,
}

impl axum::extract::connect_info::Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        let credentials = rustix::net::sockopt::socket_peercred(stream.io());
        let uid = credentials.as_ref().ok().map(|c| c.uid.as_raw());
        let (gid, pid) =
            credentials.map_or((None, None), |c| (Some(c.gid.as_raw()), Some(c.pid.as_raw_nonzero())));
        tracing::debug!(uid, gid, pid, "client connected");
        Self { uid }
    }
}

/// Which software answers.
#[utoipa::path(get, path = "/v1/version", tag = "system", responses((status = 200, body = Version)))]
pub async fn version() -> Json<Version> {
    Json(Version {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        api: "v1".to_owned(),
        pid: rustix::process::getpid().as_raw_nonzero().get(),
    })
}

/// Whether the daemon works.
#[utoipa::path(
    get, path = "/v1/health", tag = "system",
    responses((status = 200, body = Health), (status = "default", body = ErrorAnswer))
)]
pub async fn health(State(shared): State<Shared>) -> Json<Health> {
    let engine = &shared.engine;
    let templates = engine.registry.templates();
    let broken: Vec<_> = templates.iter().filter(|t| t.is_broken()).map(|t| t.name().to_owned()).collect();
    Json(Health {
        status: if broken.is_empty() { "ok" } else { "degraded" }.to_owned(),
        templates: templates.len() as u64,
        broken,
        forks: engine.registry.alive(),
        max_forks: engine.max_forks,
        lazy_loading: engine.images.is_lazy(),
    })
}

/// Answers paths that are not served.
pub async fn no_route(uri: axum::http::Uri) -> Error {
    Error::new(Code::NoSuchRoute, format!("nothing is served at {}", uri.path()))
}

/// Answers paths that end where a name should be.
pub async fn no_name() -> Error {
    Error::new(Code::InvalidName, "the name in the path is empty")
}

/// Answers methods that a path does not have.
pub async fn no_method(method: axum::http::Method, uri: axum::http::Uri) -> Error {
    Error::new(Code::MethodNotAllowed, format!("{} does not take {method}", uri.path()))
}
