//! Reading requests: every rejection is a typed error.

use axum::{
    Json,
    extract::{
        FromRequest, FromRequestParts, Path, Query, Request,
        rejection::{JsonRejection, PathRejection},
    },
    http::{StatusCode, request::Parts},
};
use serde::de::DeserializeOwned;

use super::error::{Code, Error};
use crate::names;

/// A JSON body. The content type does not matter: curl users forget it.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Error;

    async fn from_request(request: Request, state: &S) -> Result<Self, Error> {
        let bytes = axum::body::Bytes::from_request(request, state).await.map_err(|rejection| {
            let code = match rejection.status() {
                StatusCode::PAYLOAD_TOO_LARGE => Code::BodyTooLarge,
                _ => Code::InvalidRequest,
            };
            Error::new(code, "the body cannot be read").because(rejection.body_text())
        })?;
        let parsed: Result<Json<T>, JsonRejection> = Json::from_bytes(&bytes);
        let Json(value) = parsed.map_err(|rejection| {
            Error::new(Code::InvalidRequest, "the body is not what this verb takes")
                .because(rejection.body_text())
        })?;
        Ok(Self(value))
    }
}

/// A valid name or id in the path.
pub struct Name(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        let invalid =
            |cause: String| Error::new(Code::InvalidName, "the name in the path is not valid").because(cause);
        let found: Result<Path<String>, PathRejection> = Path::from_request_parts(parts, state).await;
        let Path(name) = found.map_err(|rejection| invalid(rejection.body_text()))?;
        names::validate(&name).map_err(|error| invalid(error.to_string()))?;
        Ok(Self(name))
    }
}

/// Query parameters.
pub struct Params<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Params<T> {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Error> {
        match Query::from_request_parts(parts, state).await {
            Ok(Query(value)) => Ok(Self(value)),
            Err(rejection) => {
                Err(Error::new(Code::InvalidRequest, "the query is not what this verb takes")
                    .because(rejection))
            }
        }
    }
}
