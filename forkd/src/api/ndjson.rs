//! Streamed answers: one JSON object a line.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use axum::{
    body::{Body, Bytes},
    http::{
        HeaderMap,
        header::{ACCEPT, CONTENT_TYPE},
    },
    response::{IntoResponse, Response},
};
use hyper::body::Frame;
use serde::Serialize;
use tokio::sync::mpsc;

/// Content type of streamed answers and requests.
pub const CONTENT: &str = "application/x-ndjson";

/// Whether a client asks for it.
pub fn is_accepted(headers: &HeaderMap) -> bool {
    headers.get(ACCEPT).is_some_and(|accepted| accepted.as_bytes().starts_with(CONTENT.as_bytes()))
}

/// Events as a response body. `guard` lives as long as the body: a client that goes away drops it.
struct Lines<T, G> {
    events: mpsc::Receiver<T>,
    _guard: G,
}

/// A streamed answer of `events`.
pub fn stream<T, G>(events: mpsc::Receiver<T>, guard: G) -> Response
where
    T: Serialize + Send + Unpin + 'static,
    G: Send + Unpin + 'static,
{
    let body = Body::new(Lines { events, _guard: guard });
    ([(CONTENT_TYPE, CONTENT)], body).into_response()
}

impl<T: Serialize + Unpin, G: Unpin> hyper::body::Body for Lines<T, G> {
    type Data = Bytes;
    type Error = serde_json::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, serde_json::Error>>> {
        self.events.poll_recv(context).map(|event| {
            event.map(|event| {
                let mut line = serde_json::to_vec(&event)?;
                line.push(b'\n');
                Ok(Frame::data(line.into()))
            })
        })
    }
}
