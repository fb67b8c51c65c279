//! The HTTP API: JSON on a Unix socket, described by the OpenAPI document that these types and handlers generate.

pub mod error;
pub mod types;

mod exec;
mod extract;
mod forks;
mod idempotency;
mod ndjson;
mod network;
mod ping;
mod ports;
mod reset;
mod system;
mod templates;
mod tunnel;
mod vsock;

use std::sync::Arc;

use axum::{
    Router,
    extract::DefaultBodyLimit,
    routing::{any, get},
};
use utoipa::openapi::{Info, LicenseBuilder, OpenApi};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{engine::Engine, limits};

pub use system::Peer;
pub use tunnel::PROTOCOL as TUNNEL_PROTOCOL;

/// What handlers share.
#[derive(Clone, Debug)]
pub struct Shared {
    engine: Arc<Engine>,
    replays: Arc<idempotency::Replays>,
}

fn routes() -> OpenApiRouter<Shared> {
    let exec =
        OpenApiRouter::new().routes(routes!(exec::exec)).layer(DefaultBodyLimit::max(limits::MAX_EXEC_BODY));
    OpenApiRouter::new()
        .routes(routes!(system::version))
        .routes(routes!(system::health))
        .routes(routes!(templates::build, templates::list))
        .routes(routes!(templates::inspect, templates::remove))
        .routes(routes!(templates::reload))
        .routes(routes!(templates::pool, templates::set_pool))
        .routes(routes!(templates::unload))
        .routes(routes!(forks::create, forks::list, forks::kill_many))
        .routes(routes!(forks::inspect, forks::kill))
        .routes(routes!(forks::snapshot))
        .routes(routes!(reset::reset))
        .routes(routes!(network::inspect, network::set))
        .routes(routes!(ping::ping))
        .routes(routes!(forks::console))
        .routes(routes!(ports::open, ports::list))
        .routes(routes!(ports::close))
        .routes(routes!(tunnel::tunnel))
        .routes(routes!(vsock::open, vsock::show))
        .routes(routes!(forks::memory))
        .layer(DefaultBodyLimit::max(limits::MAX_BODY))
        .merge(exec)
}

/// The OpenAPI document.
pub fn document() -> OpenApi {
    let mut document = routes().into_openapi();
    let mut info = Info::new("Forkling", env!("CARGO_PKG_VERSION"));
    info.description = Some("Forks of template VMs, on a Unix socket.".to_owned());
    info.license = Some(LicenseBuilder::new().name("Apache-2.0").identifier(Some("Apache-2.0")).build());
    // The router's own would be that of the crate it comes from.
    document.info = info;
    document
}

/// The service.
pub fn router(engine: Arc<Engine>) -> Router {
    let shared = Shared { engine, replays: Arc::default() };
    let (router, _) = routes().split_for_parts();
    // Generated once: it does not change while the daemon runs.
    let document: Arc<str> = serde_json::to_string(&document()).expect("the document is JSON").into();
    let openapi = move || async move { ([("content-type", "application/json")], document.to_string()) };
    router
        .route("/v1/openapi.json", get(openapi))
        .route("/v1/templates/", any(system::no_name))
        .route("/v1/forks/", any(system::no_name))
        .fallback(system::no_route)
        .method_not_allowed_fallback(system::no_method)
        .with_state(shared)
}

#[cfg(test)]
mod tests;
