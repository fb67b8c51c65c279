//! Children of one request, each answered for as soon as it is ready.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use axum::{
    body::{Body, Bytes},
    http::header::CONTENT_TYPE,
    response::{IntoResponse, Response},
};
use hyper::body::Frame;

use super::batch::Batch;
use crate::api::{ndjson, types::ForkEvent};

/// Bytes of lines that go out together, about, when many children are ready at once.
const FRAME: usize = 32 << 10;

/// A line for each child. Whoever goes away drops the body, and with it the children that no line was made of.
struct Lines(Batch);

/// The streamed answer of `batch`.
pub fn answer(batch: Batch) -> Response {
    ([(CONTENT_TYPE, ndjson::CONTENT)], Body::new(Lines(batch))).into_response()
}

impl hyper::body::Body for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let mut lines = Vec::new();
        while lines.len() < FRAME {
            match self.0.poll_next(context) {
                Poll::Ready(Some((index, outcome))) => {
                    let event = ForkEvent { index: index as u32, result: outcome.hand_out() };
                    serde_json::to_writer(&mut lines, &event).expect("events are JSON");
                    lines.push(b'\n');
                }
                Poll::Ready(None) if lines.is_empty() => return Poll::Ready(None),
                Poll::Pending if lines.is_empty() => return Poll::Pending,
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        Poll::Ready(Some(Ok(Frame::data(lines.into()))))
    }
}
