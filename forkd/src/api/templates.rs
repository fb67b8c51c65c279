//! Verbs on templates.

use axum::{Json, extract::State, http::StatusCode, response::Response};

use super::{
    Shared,
    error::{Code, Error, ErrorAnswer},
    extract::{Body, Name},
    ndjson,
    types::{BuildEvent, BuildTemplate, PoolInfo, PoolSettings, TemplateInfo, Templates},
};
use crate::{pool, template::build as building};

/// Builds a template. Answers with one event a line; the last is `done` or `error`. Going away cancels the build.
#[utoipa::path(
    post, path = "/v1/templates", tag = "templates", request_body = BuildTemplate,
    responses(
        (status = 200, body = BuildEvent, content_type = "application/x-ndjson"),
        (status = "default", body = ErrorAnswer)
    )
)]
pub async fn build(State(shared): State<Shared>, Body(spec): Body<BuildTemplate>) -> Result<Response, Error> {
    let mut build = building::start(&shared.engine, spec)?;
    let events = build.take_events();
    Ok(ndjson::stream(events, build))
}

/// Lists the templates.
#[utoipa::path(get, path = "/v1/templates", tag = "templates", responses((status = 200, body = Templates)))]
pub async fn list(State(shared): State<Shared>) -> Json<Templates> {
    let engine = &shared.engine;
    let templates = engine.registry.templates().iter().map(|template| template.info(engine)).collect();
    Json(Templates { templates })
}

/// Shows a template.
#[utoipa::path(
    get, path = "/v1/templates/{name}", tag = "templates", params(("name" = String, Path)),
    responses((status = 200, body = TemplateInfo), (status = "default", body = ErrorAnswer))
)]
pub async fn inspect(State(shared): State<Shared>, Name(name): Name) -> Result<Json<TemplateInfo>, Error> {
    let template = shared.engine.registry.template(&name)?;
    let mut info = template.info(&shared.engine);
    // Looks at thousands of files.
    let unique = tokio::task::spawn_blocking(move || crate::template::unique_bytes(&template)).await;
    info.disk_unique_bytes = unique.ok();
    Ok(Json(info))
}

/// Removes a template. Refused while it has forks.
#[utoipa::path(
    delete, path = "/v1/templates/{name}", tag = "templates", params(("name" = String, Path)),
    responses((status = 204), (status = "default", body = ErrorAnswer))
)]
pub async fn remove(State(shared): State<Shared>, Name(name): Name) -> Result<StatusCode, Error> {
    building::delete(&shared.engine, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Shows a template's pool.
#[utoipa::path(
    get, path = "/v1/templates/{name}/pool", tag = "templates", params(("name" = String, Path)),
    responses((status = 200, body = PoolInfo), (status = "default", body = ErrorAnswer))
)]
pub async fn pool(State(shared): State<Shared>, Name(name): Name) -> Result<Json<PoolInfo>, Error> {
    Ok(Json(shared.engine.registry.template(&name)?.pool().info()))
}

/// Says how many parked forks a template should have, now and after restarts of the daemon. They are made in the background.
#[utoipa::path(
    put, path = "/v1/templates/{name}/pool", tag = "templates", request_body = PoolSettings,
    params(("name" = String, Path)),
    responses((status = 200, body = PoolInfo), (status = "default", body = ErrorAnswer))
)]
pub async fn set_pool(
    State(shared): State<Shared>,
    Name(name): Name,
    Body(settings): Body<PoolSettings>,
) -> Result<Json<PoolInfo>, Error> {
    settings.check().map_err(|message| Error::new(Code::InvalidRequest, message))?;
    let template = shared.engine.registry.template(&name)?;
    let _changing = template.pool().changing().await;
    if template.pool().configure(settings).start {
        tokio::spawn(pool::keep(shared.engine.clone(), template.clone()));
    }
    pool::write(&template, settings).await;
    Ok(Json(template.pool().info()))
}

/// Unloads a template without forks: its zygote ends and its memory is free. The next fork loads it again.
#[utoipa::path(
    post, path = "/v1/templates/{name}/unload", tag = "templates", params(("name" = String, Path)),
    responses((status = 200, body = TemplateInfo), (status = "default", body = ErrorAnswer))
)]
pub async fn unload(State(shared): State<Shared>, Name(name): Name) -> Result<Json<TemplateInfo>, Error> {
    let template = shared.engine.registry.template(&name)?;
    crate::template::unload(&shared.engine, &template).await?;
    Ok(Json(template.info(&shared.engine)))
}

/// Loads a template: a cold one ahead of its first fork, a broken one anew.
#[utoipa::path(
    post, path = "/v1/templates/{name}/reload", tag = "templates", params(("name" = String, Path)),
    responses((status = 200, body = TemplateInfo), (status = "default", body = ErrorAnswer))
)]
pub async fn reload(State(shared): State<Shared>, Name(name): Name) -> Result<Json<TemplateInfo>, Error> {
    let template = shared.engine.registry.template(&name)?;
    template.reload(&shared.engine).await?;
    Ok(Json(template.info(&shared.engine)))
}
