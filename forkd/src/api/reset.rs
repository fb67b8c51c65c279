//! Resetting a fork in place.

use axum::{Json, extract::State};

use super::{
    Shared,
    error::{Error, ErrorAnswer},
    extract::{Body, Name},
    forks::{running, timeout_of},
    types::{ForkInfo, ResetFork},
};
use crate::limits::DEFAULT_CREATE_TIMEOUT;

/// Takes a running fork back to where its template was frozen, in place: same id, new generation. Everything it wrote
/// is gone, connections into it are cut.
#[utoipa::path(
    post, path = "/v1/forks/{id}/reset", tag = "forks", request_body = ResetFork,
    params(("id" = String, Path, description = "id or name")),
    responses((status = 200, body = ForkInfo), (status = "default", body = ErrorAnswer))
)]
pub async fn reset(
    State(shared): State<Shared>,
    Name(id): Name,
    Body(request): Body<ResetFork>,
) -> Result<Json<ForkInfo>, Error> {
    let within = timeout_of(request.timeout_ms)?.unwrap_or(DEFAULT_CREATE_TIMEOUT);
    let fork = running(&shared, &id)?;
    // To its end even if the caller goes away: a fork that is half reset is of no use.
    let task = tokio::spawn(async move {
        fork.reset(&shared.engine, &request, within).await?;
        Ok(fork.info())
    });
    task.await
        .unwrap_or_else(|error| {
            Err(Error::new(super::error::Code::Internal, "the reset's task was lost").because(error))
        })
        .map(Json)
}
