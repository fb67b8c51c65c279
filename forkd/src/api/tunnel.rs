//! A request that becomes a raw stream to a port of a guest.

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::{io::copy_bidirectional_with_sizes, net::UnixStream};
use utoipa::IntoParams;

use super::{
    Shared,
    error::{Code, Error, ErrorAnswer},
    exec::with_agent,
    extract::{Name, Params},
    ports::port_of,
};
use crate::forward;

/// What the connection is upgraded to.
pub const PROTOCOL: &str = "forkling-tunnel";

/// Bytes in passing, each way.
const BUFFER: usize = 64 << 10;

/// Where to.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Target {
    /// TCP port of the guest's loopback, 1 to 65535.
    port: u32,
}

/// Turns the connection into a raw stream to a TCP port of the guest's loopback: after the answer 101 every byte is the
/// guest server's, both ways, and either side may end its direction. The guest needs no network for it.
#[utoipa::path(
    get, path = "/v1/forks/{id}/tunnel", tag = "forks",
    params(
        ("id" = String, Path, description = "id or name"), Target,
        ("Upgrade" = String, Header, description = "forkling-tunnel"),
        ("Connection" = String, Header, description = "Upgrade"),
    ),
    responses((status = 101, description = "the stream"), (status = "default", body = ErrorAnswer))
)]
pub async fn tunnel(
    State(shared): State<Shared>,
    Name(id): Name,
    Params(target): Params<Target>,
    mut request: Request<Body>,
) -> Result<Response, Error> {
    let port = port_of(target.port)?;
    if !asks_for_upgrade(request.headers()) {
        let message = "a tunnel is a connection that is upgraded, and the request does not ask for that";
        return Err(Error::new(Code::UpgradeRequired, message));
    }
    let fork = with_agent(&shared, &id)?;
    let stream = forward::tunnel(&fork, port).await?;
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgrade.await {
            Ok(client) => join(TokioIo::new(client), stream).await,
            Err(error) => tracing::debug!(fork = fork.id, %error, "a tunnel's client went away"),
        }
    });
    let headers = [
        (header::CONNECTION, HeaderValue::from_static("upgrade")),
        (header::UPGRADE, HeaderValue::from_static(PROTOCOL)),
    ];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

async fn join(mut client: TokioIo<hyper::upgrade::Upgraded>, mut stream: UnixStream) {
    // However it ends, both are closed then.
    let _ = copy_bidirectional_with_sizes(&mut client, &mut stream, BUFFER, BUFFER).await;
}

/// Whether the headers ask for a tunnel (RFC 9110, 7.8).
fn asks_for_upgrade(headers: &HeaderMap) -> bool {
    let has = |name, token: &str| {
        let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|item| item.trim().eq_ignore_ascii_case(token))
    };
    has(header::CONNECTION, "upgrade") && has(header::UPGRADE, PROTOCOL)
}
