//! Verbs on forks.

use std::{fmt::Write as _, sync::Arc, time::Duration};

use axum::{
    Json,
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode},
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use tokio::time::Instant;
use utoipa::IntoParams;

use super::{
    Shared,
    error::{Code, Error, ErrorAnswer},
    extract::{Body, Name, Params},
    ndjson,
    types::{
        ConsoleAnswer, CreateForks, ForkEvent, ForkInfo, ForkMemory, ForkResult, Forks, Killed, PoolUse,
        SnapshotFork, TemplateInfo, Timings,
    },
};
use crate::{
    admission::Granted,
    engine::Engine,
    fork::{self, Fork, Request, Status},
    identity::Choice,
    limits::{DEFAULT_CREATE_TIMEOUT, MAX_COUNT, MAX_METADATA, MAX_TIMEOUT},
    memory as measure, names,
    template::{Template, snapshot as snapshots, validate_environment},
};

use super::network::network_choice;
use batch::{Batch, Outcome};

mod batch;
mod stream;

/// Makes forks. Each element of the answer is a fork or an error, in the order asked for. With an `Idempotency-Key`
/// the same request made again gets the same answer.
///
/// With `Accept: application/x-ndjson` there is a line for each child, as soon as it is ready. Going away kills the
/// children that no line was sent of. Such an answer cannot be replayed.
///
/// A child that the host has no room for gets the error `host_full` or `too_many_forks`. If there is room for none, the
/// answer is 429 with `Retry-After`.
#[utoipa::path(
    post, path = "/v1/forks", tag = "forks", request_body = CreateForks,
    params(("Idempotency-Key" = Option<String>, Header)),
    responses(
        (status = 201, body = Vec<ForkResult>),
        (status = 200, body = ForkEvent, content_type = "application/x-ndjson"),
        (status = 429, body = ErrorAnswer, headers(("Retry-After" = u32, description = "seconds"))),
        (status = "default", body = ErrorAnswer)
    )
)]
pub async fn create(
    State(shared): State<Shared>,
    headers: HeaderMap,
    Body(request): Body<CreateForks>,
) -> Result<Response, Error> {
    let received_ns = fork::monotonic_ns();
    let requests = plan(&shared.engine, &request, received_ns)?;
    let key = headers.get("idempotency-key");
    if ndjson::is_accepted(&headers) {
        if key.is_some() {
            let message =
                "a streamed answer cannot be replayed: leave out Idempotency-Key, or the Accept header";
            return Err(Error::new(Code::InvalidRequest, message));
        }
        let granted = admit(&shared.engine, &requests).await?;
        return Ok(stream::answer(Batch::start(&shared.engine, requests, granted)));
    }
    let Some(key) = key else {
        let results = run(shared.engine, requests).await?;
        return Ok(answer(&results, false));
    };
    let key = key.to_str().map_err(|_| Error::new(Code::InvalidRequest, "Idempotency-Key is not ASCII"))?;
    let identity = blake3::hash(&serde_json::to_vec(&request).expect("requests are JSON"));
    let engine = shared.engine.clone();
    let (results, replay) = shared.replays.answer(key, identity, run(engine, requests)).await?;
    Ok(answer(&results, replay))
}

/// Checks a request and spells out its children.
fn plan(engine: &Engine, request: &CreateForks, received_ns: u64) -> Result<Vec<Request>, Error> {
    let invalid_name = |what: &str, error: names::Error| {
        Error::new(Code::InvalidName, format!("{what} is not a valid name")).because(error)
    };
    names::validate(&request.template).map_err(|error| invalid_name("template", error))?;
    let count =
        request.count.unwrap_or_else(|| u32::try_from(request.names.len()).unwrap_or(u32::MAX).max(1));
    if !(1..=MAX_COUNT).contains(&count) {
        return Err(Error::new(
            Code::InvalidCount,
            format!("count is {count}, not between 1 and {MAX_COUNT}"),
        ));
    }
    let names = child_names(request, count)?;
    if let Some(hostname) = &request.hostname {
        names::validate_hostname(hostname).map_err(|error| invalid_name("hostname", error))?;
    }
    validate_environment(request.env.iter())?;
    let bytes: usize = request.metadata.iter().map(|(key, value)| key.len() + value.len()).sum();
    if bytes > MAX_METADATA {
        let message = format!("metadata has {bytes} bytes, more than {MAX_METADATA}");
        return Err(Error::new(Code::InvalidRequest, message));
    }
    let timeout = timeout_of(request.timeout_ms)?.unwrap_or(DEFAULT_CREATE_TIMEOUT);
    let template: Arc<Template> = engine.registry.template(&request.template)?;
    let network = Arc::new(network_choice(engine, request, &template, count)?);
    let metadata = Arc::new(request.metadata.clone());
    let env: Vec<_> = request.env.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
    let deadline = Instant::now() + timeout;
    let child = |name: Option<String>| Request {
        template: template.clone(),
        choice: Choice { hostname: request.hostname.clone(), name, env: env.clone(), param: request.param },
        network: network.clone(),
        metadata: metadata.clone(),
        pool: request.pool,
        deadline,
        received_ns,
    };
    Ok(names.into_iter().map(child).collect())
}

fn child_names(request: &CreateForks, count: u32) -> Result<Vec<Option<String>>, Error> {
    let names: Vec<Option<String>> = match (&request.names[..], &request.name_prefix) {
        ([], None) => return Ok(vec![None; count as usize]),
        ([], Some(prefix)) if count == 1 => vec![Some(prefix.clone())],
        ([], Some(prefix)) => (0..count).map(|index| Some(format!("{prefix}-{index}"))).collect(),
        (names, None) if names.len() == count as usize => names.iter().cloned().map(Some).collect(),
        (names, None) => {
            let message = format!("{} names for {count} forks", names.len());
            return Err(Error::new(Code::InvalidRequest, message));
        }
        (_, Some(_)) => {
            return Err(Error::new(Code::InvalidRequest, "names and name_prefix are both set; set one"));
        }
    };
    for name in names.iter().flatten() {
        names::validate(name).map_err(|error| {
            Error::new(Code::InvalidName, format!("{name:?} is not a valid name for a fork")).because(error)
        })?;
    }
    Ok(names)
}

/// A timeout from a request.
pub fn timeout_of(milliseconds: Option<u64>) -> Result<Option<Duration>, Error> {
    let Some(milliseconds) = milliseconds else { return Ok(None) };
    let timeout = Duration::from_millis(milliseconds);
    if timeout.is_zero() || timeout > MAX_TIMEOUT {
        let message = format!("timeout_ms is {milliseconds}, not between 1 and {}", MAX_TIMEOUT.as_millis());
        return Err(Error::new(Code::InvalidRequest, message));
    }
    Ok(Some(timeout))
}

/// Asks for room for the children of a request. An error if there is none for any.
async fn admit(engine: &Engine, requests: &[Request]) -> Result<Granted, Error> {
    let first = requests.first().expect("a request has children");
    let parked = if first.pool == PoolUse::Use { first.template.pool().parked() } else { 0 };
    let mut granted = engine.admission.admit(engine, &first.template, requests.len(), parked).await;
    match granted.refusal.take_if(|_| granted.tickets.is_empty()) {
        Some(refusal) => Err(refusal),
        None => Ok(granted),
    }
}

/// Makes all children side by side. Cancelled, it leaves none. An error if there is no room for any.
async fn run(engine: Arc<Engine>, mut requests: Vec<Request>) -> Result<Vec<ForkResult>, Error> {
    let mut granted = admit(&engine, &requests).await?;
    if requests.len() == 1 {
        // The common case needs no task of its own.
        let (request, ticket) = requests.pop().zip(granted.tickets.pop()).expect("one of each");
        return collect(vec![batch::make(&engine, request, ticket).await]);
    }
    let mut batch = Batch::start(&engine, requests, granted);
    let mut outcomes: Vec<Option<Outcome>> = (0..batch.len()).map(|_| None).collect();
    while let Some((index, outcome)) = batch.next().await {
        outcomes[index] = Some(outcome);
    }
    collect(outcomes.into_iter().map(|outcome| outcome.expect("a batch tells of every child")).collect())
}

/// The answer for all; an error if every child was refused for want of room.
fn collect(outcomes: Vec<Outcome>) -> Result<Vec<ForkResult>, Error> {
    let is_refused = |outcome: &Outcome| {
        outcome.error().is_some_and(|error| error.status() == StatusCode::TOO_MANY_REQUESTS)
    };
    if outcomes.iter().all(is_refused) {
        return Err(outcomes[0].error().expect("it was refused").clone());
    }
    Ok(outcomes.into_iter().map(Outcome::hand_out).collect())
}

fn answer(results: &[ForkResult], replay: bool) -> Response {
    let mut response = (StatusCode::CREATED, Json(results)).into_response();
    let first = results.iter().find_map(|result| match result {
        ForkResult::Fork(fork) => fork.timings_us,
        ForkResult::Error(_) => None,
    });
    let headers = response.headers_mut();
    if let Some(timings) =
        first.as_ref().and_then(|timings| HeaderValue::from_str(&server_timing(timings)).ok())
    {
        headers.insert("server-timing", timings);
    }
    if replay {
        headers.insert("idempotent-replayed", HeaderValue::from_static("true"));
    }
    response
}

/// `Server-Timing` (W3C) of the first child, in milliseconds.
fn server_timing(t: &Timings) -> String {
    let phases = [
        ("queue", t.queue),
        ("fork", t.fork),
        ("vm", t.vm),
        ("vcpus", t.vcpus),
        ("restore", t.restore),
        ("activate", t.activate),
        ("enter", t.enter),
        ("guest", t.guest),
        ("reply", t.reply),
        ("total", t.total),
    ];
    let mut text = String::with_capacity(160);
    for (name, micros) in phases {
        let separator = if text.is_empty() { "" } else { ", " };
        write!(text, "{separator}{name};dur={:.3}", micros / 1000.0).expect("strings take all");
    }
    text
}

/// Which forks.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Filter {
    /// Of this template only.
    template: Option<String>,
    /// Dead ones too (list), or all forks there are (kill).
    #[serde(default)]
    all: bool,
}

impl Filter {
    fn check(&self) -> Result<(), Error> {
        let Some(template) = &self.template else { return Ok(()) };
        names::validate(template)
            .map_err(|error| Error::new(Code::InvalidName, "template is not a valid name").because(error))
    }
}

/// Lists the forks.
#[utoipa::path(
    get, path = "/v1/forks", tag = "forks", params(Filter),
    responses((status = 200, body = Forks), (status = "default", body = ErrorAnswer))
)]
pub async fn list(
    State(shared): State<Shared>,
    Params(filter): Params<Filter>,
) -> Result<Json<Forks>, Error> {
    filter.check()?;
    let forks = shared.engine.registry.forks(filter.template.as_deref(), filter.all);
    Ok(Json(Forks { forks: forks.iter().map(|fork| fork.info()).collect() }))
}

/// Kills the forks of a template, or all with `all=true`.
#[utoipa::path(
    delete, path = "/v1/forks", tag = "forks", params(Filter),
    responses((status = 200, body = Killed), (status = "default", body = ErrorAnswer))
)]
pub async fn kill_many(
    State(shared): State<Shared>,
    Params(filter): Params<Filter>,
) -> Result<Json<Killed>, Error> {
    filter.check()?;
    if filter.template.is_none() && !filter.all {
        return Err(Error::new(
            Code::InvalidRequest,
            "neither template nor all=true says which forks to kill",
        ));
    }
    let registry = &shared.engine.registry;
    let forks = registry.forks(filter.template.as_deref(), false);
    for fork in &forks {
        fork.condemn(REASON, MESSAGE);
    }
    let killed = Killed { killed: forks.iter().map(|fork| fork.id.clone()).collect() };
    // From here on they are dead to everybody. Each signal makes a process tear itself down, in competition for the
    // cores; the caller does not wait for that.
    tokio::spawn(async move {
        for fork in forks {
            end(&fork);
            tokio::task::yield_now().await;
        }
    });
    Ok(Json(killed))
}

/// Shows a fork, dead ones for some minutes.
#[utoipa::path(
    get, path = "/v1/forks/{id}", tag = "forks", params(("id" = String, Path, description = "id or name")),
    responses((status = 200, body = ForkInfo), (status = "default", body = ErrorAnswer))
)]
pub async fn inspect(State(shared): State<Shared>, Name(id): Name) -> Result<Json<ForkInfo>, Error> {
    Ok(Json(shared.engine.registry.fork(&id)?.info()))
}

/// Kills a fork, now. Killing a dead one is no error.
#[utoipa::path(
    delete, path = "/v1/forks/{id}", tag = "forks", params(("id" = String, Path, description = "id or name")),
    responses((status = 204), (status = "default", body = ErrorAnswer))
)]
pub async fn kill(State(shared): State<Shared>, Name(id): Name) -> Result<StatusCode, Error> {
    let fork = shared.engine.registry.fork(&id)?;
    end(&fork);
    Ok(StatusCode::NO_CONTENT)
}

/// How forks die that are killed by request.
const REASON: &str = "killed";
const MESSAGE: &str = "it was killed by request";

fn end(fork: &Fork) {
    fork.kill(REASON, MESSAGE);
}

/// Makes a template of a running fork, which goes on.
#[utoipa::path(
    post, path = "/v1/forks/{id}/snapshot", tag = "forks", request_body = SnapshotFork,
    params(("id" = String, Path, description = "id or name")),
    responses((status = 201, body = TemplateInfo), (status = "default", body = ErrorAnswer))
)]
pub async fn snapshot(
    State(shared): State<Shared>,
    Name(id): Name,
    Body(request): Body<SnapshotFork>,
) -> Result<(StatusCode, Json<TemplateInfo>), Error> {
    names::validate(&request.name)
        .map_err(|error| Error::new(Code::InvalidName, "the template's name is not valid").because(error))?;
    let fork = running(&shared, &id)?;
    let engine = shared.engine.clone();
    // To its end even if the caller goes away: a fork that is being saved cannot be asked to stop.
    let taken = tokio::spawn(async move {
        let template = snapshots::take(&engine, &fork, &request.name).await?;
        Ok(template.info(&engine))
    });
    let taken = taken
        .await
        .map_err(|error| Error::new(Code::Internal, "the snapshot's task was lost").because(error))?;
    Ok((StatusCode::CREATED, Json(taken?)))
}

/// The last output of the guest's serial console.
#[utoipa::path(
    get, path = "/v1/forks/{id}/console", tag = "forks", params(("id" = String, Path, description = "id or name")),
    responses((status = 200, body = ConsoleAnswer), (status = "default", body = ErrorAnswer))
)]
pub async fn console(State(shared): State<Shared>, Name(id): Name) -> Result<Json<ConsoleAnswer>, Error> {
    let (bytes, dropped_bytes) = shared.engine.registry.fork(&id)?.console();
    Ok(Json(ConsoleAnswer { text: String::from_utf8_lossy(&bytes).into_owned(), dropped_bytes }))
}

/// Where the memory of a running fork is: shared with its template, its own, and what it costs beside.
#[utoipa::path(
    get, path = "/v1/forks/{id}/memory", tag = "forks", params(("id" = String, Path, description = "id or name")),
    responses((status = 200, body = ForkMemory), (status = "default", body = ErrorAnswer))
)]
pub async fn memory(State(shared): State<Shared>, Name(id): Name) -> Result<Json<ForkMemory>, Error> {
    let fork = running(&shared, &id)?;
    let pid = fork.pid().expect("what runs has a process");
    let measured = tokio::task::spawn_blocking(move || measure::of(pid)).await;
    let measured = measured
        .map_err(|error| Error::new(Code::Internal, "the measurement's task was lost").because(error))?;
    // The process may have died meanwhile, and its number may be another's by now.
    match (fork.death_error(), measured) {
        (Some(died), _) => Err(died),
        (None, Ok(memory)) => Ok(Json(memory)),
        (None, Err(error)) => {
            let message = format!("the memory of fork {} cannot be measured", fork.id);
            Err(Error::new(Code::MeasureFailed, message).because(error))
        }
    }
}

/// A fork that runs.
pub fn running(shared: &Shared, id: &str) -> Result<Arc<Fork>, Error> {
    let fork = shared.engine.registry.fork(id)?;
    match fork.status() {
        Status::Running(_) => Ok(fork),
        Status::Creating => Err(Error::new(Code::ForkNotFound, format!("fork {id} is still being made"))),
        Status::Died(_) => Err(fork.death_error().expect("it is dead")),
    }
}
