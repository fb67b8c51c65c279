//! Forwarded ports of forks.

use std::net::SocketAddr;

use axum::{
    Json,
    extract::{Path, State},
    http::StatusCode,
};

use super::{
    Shared,
    error::{Code, Error, ErrorAnswer},
    exec::with_agent,
    extract::{Body, Name},
    forks::running,
    types::{ForwardPort, PortInfo, Ports},
};
use crate::{
    forward::{self, Wanted},
    names, vsock,
};

/// Forwards a port of the host, on the loopback or a Unix socket, to a TCP port of the guest's loopback. The guest needs no
/// network for it. Connections are raw streams. It ends with the fork.
#[utoipa::path(
    post, path = "/v1/forks/{id}/ports", tag = "forks", request_body = ForwardPort,
    params(("id" = String, Path, description = "id or name")),
    responses((status = 201, body = PortInfo), (status = "default", body = ErrorAnswer))
)]
pub async fn open(
    State(shared): State<Shared>,
    Name(id): Name,
    Body(request): Body<ForwardPort>,
) -> Result<(StatusCode, Json<PortInfo>), Error> {
    let guest_port = port_of(request.guest_port)?;
    let wanted = wanted(request)?;
    let fork = with_agent(&shared, &id)?;
    let info = forward::open(&shared.engine.config, &fork, guest_port, &wanted)?;
    Ok((StatusCode::CREATED, Json(info)))
}

/// A port of a guest.
pub fn port_of(number: u32) -> Result<u16, Error> {
    let port = u16::try_from(number).ok().filter(|&port| port > 0);
    port.ok_or_else(|| Error::new(Code::InvalidPort, format!("{number} is no TCP port")))
}

fn wanted(request: ForwardPort) -> Result<Wanted, Error> {
    match (request.host, request.unix) {
        (Some(_), Some(_)) => Err(Error::new(Code::InvalidRequest, "host and unix are both set; set one")),
        (None, Some(name)) => {
            let invalid = |cause: String| {
                Error::new(Code::InvalidName, format!("{name:?} is not a valid name for a socket"))
                    .because(cause)
            };
            names::validate(&name).map_err(|error| invalid(error.to_string()))?;
            if name.starts_with(vsock::NAME) {
                return Err(invalid(format!("names that begin with {} are taken", vsock::NAME)));
            }
            Ok(Wanted::Unix(name))
        }
        (host, None) => {
            let host = host.as_deref().unwrap_or("127.0.0.1:0");
            let address: SocketAddr = host.parse().map_err(|_| {
                Error::new(Code::InvalidRequest, format!("host {host:?} is not an address and a port"))
                    .because("an example is 127.0.0.1:8080")
            })?;
            if !address.ip().is_loopback() {
                return Err(Error::new(
                    Code::AddressNotLoopback,
                    format!("{address} is not of the loopback"),
                ));
            }
            Ok(Wanted::Tcp(address))
        }
    }
}

/// Lists the forwarded ports of a fork.
#[utoipa::path(
    get, path = "/v1/forks/{id}/ports", tag = "forks", params(("id" = String, Path, description = "id or name")),
    responses((status = 200, body = Ports), (status = "default", body = ErrorAnswer))
)]
pub async fn list(State(shared): State<Shared>, Name(id): Name) -> Result<Json<Ports>, Error> {
    Ok(Json(Ports { ports: running(&shared, &id)?.ways.list() }))
}

/// Ends a forwarded port and the connections through it.
#[utoipa::path(
    delete, path = "/v1/forks/{id}/ports/{port}", tag = "forks",
    params(("id" = String, Path, description = "id or name"), ("port" = String, Path, description = "its id")),
    responses((status = 204), (status = "default", body = ErrorAnswer))
)]
pub async fn close(
    State(shared): State<Shared>,
    Path((id, port)): Path<(String, String)>,
) -> Result<StatusCode, Error> {
    for name in [&id, &port] {
        names::validate(name).map_err(|error| {
            Error::new(Code::InvalidName, "a name in the path is not valid").because(error)
        })?;
    }
    forward::close(&*running(&shared, &id)?, &port).await?;
    Ok(StatusCode::NO_CONTENT)
}
