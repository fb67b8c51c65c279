//! Asking a fork's agent whether it answers.

use std::sync::Arc;

use axum::{Json, extract::State};
use forkling_proto::rpc::Kind;
use tokio::time::timeout;

use super::{
    Shared,
    error::{Code, Error, ErrorAnswer, chain},
    extract::Name,
    forks::running,
    types::Pong,
};
use crate::{
    agent,
    fork::{Fork, monotonic_ns},
    limits::AGENT_GRACE,
};

/// Makes a round trip to the fork's agent, over the connection that commands take.
#[utoipa::path(
    post, path = "/v1/forks/{id}/ping", tag = "forks", params(("id" = String, Path, description = "id or name")),
    responses((status = 200, body = Pong), (status = "default", body = ErrorAnswer))
)]
pub async fn ping(State(shared): State<Shared>, Name(id): Name) -> Result<Json<Pong>, Error> {
    let began = monotonic_ns();
    let fork = running(&shared, &id)?;
    match timeout(AGENT_GRACE, round_trip(&fork)).await {
        Ok(Ok(())) => Ok(Json(Pong { micros: (monotonic_ns() - began) as f64 / 1000.0 })),
        Ok(Err(error)) => Err(fork.explain(error).await),
        Err(_) => Err(Error::new(Code::AgentUnreachable, format!("the agent of fork {id} does not answer"))),
    }
}

async fn round_trip(fork: &Arc<Fork>) -> Result<(), Error> {
    let lost = |error: agent::Error| {
        Error::new(Code::AgentUnreachable, format!("the agent of fork {} did not answer", fork.id))
            .because(chain(&error))
    };
    fork.agent().await?.round_trip(Kind::Ping).await.map_err(lost)
}
