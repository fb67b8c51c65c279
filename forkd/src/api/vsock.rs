//! A fork's vsock socket.

use axum::{Json, extract::State};

use super::{
    Shared,
    error::{Code, Error, ErrorAnswer},
    extract::Name,
    forks::running,
    types::VsockInfo,
};
use crate::vsock;

/// Opens a Unix socket to the fork's vsock, by Firecracker's convention, and lets its guest connect to the host. Asked for
/// again, the answer is the same. It goes with the fork.
#[utoipa::path(
    post, path = "/v1/forks/{id}/vsock", tag = "forks", params(("id" = String, Path, description = "id or name")),
    responses((status = 200, body = VsockInfo), (status = "default", body = ErrorAnswer))
)]
pub async fn open(State(shared): State<Shared>, Name(id): Name) -> Result<Json<VsockInfo>, Error> {
    let fork = running(&shared, &id)?;
    let path = vsock::open(&shared.engine.config, &fork).await?;
    Ok(Json(VsockInfo { path: path.display().to_string() }))
}

/// Shows the vsock socket of a fork.
#[utoipa::path(
    get, path = "/v1/forks/{id}/vsock", tag = "forks", params(("id" = String, Path, description = "id or name")),
    responses((status = 200, body = VsockInfo), (status = "default", body = ErrorAnswer))
)]
pub async fn show(State(shared): State<Shared>, Name(id): Name) -> Result<Json<VsockInfo>, Error> {
    let fork = running(&shared, &id)?;
    let path = fork.ways.vsock.lock().await.clone();
    let none = || Error::new(Code::VsockNotOpen, format!("the vsock socket of fork {id} was not asked for"));
    Ok(Json(VsockInfo { path: path.ok_or_else(none)?.display().to_string() }))
}
