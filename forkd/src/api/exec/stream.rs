//! Streamed exec. Each has an agent connection of its own, so that a slow reader stops its own command and no other.

use std::{sync::Arc, time::Duration};

use axum::{
    body::{Body, Bytes},
    response::Response,
};
use forkling_proto::rpc::Kind;
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;
use tokio::{sync::mpsc, time::timeout};

use super::{Command, call_error, end_of, with_agent};
use crate::{
    agent::{self, Call, Event, Input},
    api::{
        Shared,
        error::{Code, Error},
        ndjson,
        types::{self, ExecEvent, ExecInput, Output, input_bytes},
    },
    fork::Fork,
    limits::{MAX_EXEC_LINE, START_TIMEOUT},
};

/// Events that may wait for the client.
const EVENTS: usize = 16;

/// How long the answer stays open after its last line for the end of the request.
const LINGER: Duration = Duration::from_secs(5);

/// Streams output; the input is in the request.
pub async fn output(fork: Arc<Fork>, command: Command) -> Result<Response, Error> {
    let stdin = command.stdin.clone();
    let (call, first) = begin(&fork, &command).await?;
    let input = call.input();
    let feed = async move {
        input.stdin(&stdin).await?;
        input.close()?;
        Ok(())
    };
    Ok(answer(fork, call, first, feed))
}

/// Streams input and output. The first line is read before anything is refused: a client that is still sending it
/// would not see the answer.
pub async fn both_ways(shared: &Shared, id: &str, body: Body) -> Result<Response, Error> {
    let mut lines = Lines { body, buffer: Vec::new(), scanned: 0 };
    let none = || Error::new(Code::InvalidRequest, "the body has no first line with the command");
    let request: types::Exec = lines.next().await?.ok_or_else(none)?;
    let command = Command::new(request)?;
    let fork = with_agent(shared, id)?;
    let (call, first) = begin(&fork, &command).await?;
    let input = call.input();
    let feed = async move {
        let forwarded = forward(&input, &command.stdin, &mut lines).await;
        if matches!(forwarded, Err(FeedError::Agent)) {
            // The command takes no more; the client may still be sending.
            while lines.data().await?.is_some() {}
        }
        forwarded
    };
    Ok(answer(fork, call, first, feed))
}

/// Why input ends before the command does.
enum FeedError {
    /// The client's fault; it is told.
    Request(Error),
    /// The call's end tells more.
    Agent,
}

impl From<Error> for FeedError {
    fn from(error: Error) -> Self {
        Self::Request(error)
    }
}

impl From<agent::Error> for FeedError {
    fn from(_: agent::Error) -> Self {
        Self::Agent
    }
}

async fn forward(input: &Input, first: &[u8], lines: &mut Lines) -> Result<(), FeedError> {
    input.stdin(first).await?;
    while let Some(line) = lines.next::<ExecInput>().await? {
        pass(input, line).await?;
    }
    Ok(input.close()?)
}

async fn pass(input: &Input, line: ExecInput) -> Result<(), FeedError> {
    if let Some(signal) = line.signal {
        input.signal(signal)?;
    }
    let invalid = |message| Error::new(Code::InvalidRequest, message);
    if let Some(bytes) = input_bytes(line.stdin, line.stdin_base64).map_err(invalid)? {
        input.stdin(&bytes).await?;
    }
    Ok(())
}

/// Starts the command; one that cannot be started is an error of the request, not an event.
async fn begin(fork: &Arc<Fork>, command: &Command) -> Result<(Call, Event), Error> {
    let connection = fork.connect_agent().await?;
    let started = async {
        let mut call = connection.call(Kind::Exec, &command.payload)?;
        let first = timeout(START_TIMEOUT, call.next()).await.map_err(|_| agent::Error::Silent)??;
        Ok((call, first))
    };
    match started.await {
        Ok(started) => Ok(started),
        Err(error) => Err(call_error(fork, error).await),
    }
}

fn answer<F>(fork: Arc<Fork>, call: Call, first: Event, feed: F) -> Response
where
    F: Future<Output = Result<(), FeedError>> + Send + 'static,
{
    let (sender, events) = mpsc::channel(EVENTS);
    tokio::spawn(async move {
        let closed = sender.clone();
        tokio::select! {
            () = pump(&fork, call, first, feed, &sender) => {}
            // The client went away: the call is dropped, which kills the command.
            () = closed.closed() => {}
        }
    });
    ndjson::stream(events, ())
}

async fn pump<F>(fork: &Arc<Fork>, mut call: Call, first: Event, feed: F, sender: &mpsc::Sender<ExecEvent>)
where
    F: Future<Output = Result<(), FeedError>>,
{
    let mut feed = std::pin::pin!(feed);
    let mut fed = false;
    let mut event = Ok(first);
    loop {
        let shown = match event {
            Ok(Event::Started(pid)) => ExecEvent::Started { pid },
            Ok(Event::Stdout(bytes)) => ExecEvent::Stdout(Output::new(&bytes)),
            Ok(Event::Stderr(bytes)) => ExecEvent::Stderr(Output::new(&bytes)),
            Ok(Event::Exit(exit)) => ExecEvent::Exit(end_of(exit)),
            Ok(Event::Pong) => {
                let error = call_error(fork, agent::Error::Malformed("answer to a command")).await;
                ExecEvent::Error { error: error.body() }
            }
            Err(error) => ExecEvent::Error { error: call_error(fork, error).await.body() },
        };
        let last = matches!(shown, ExecEvent::Exit(_) | ExecEvent::Error { .. });
        if sender.send(shown).await.is_err() {
            return;
        }
        if last {
            // A connection that is closed while its client still sends loses what the client has not read yet.
            if !fed {
                let _ = timeout(LINGER, feed).await;
            }
            return;
        }
        event = loop {
            tokio::select! {
                event = call.next() => break event,
                outcome = &mut feed, if !fed => {
                    fed = true;
                    if let Err(FeedError::Request(error)) = outcome {
                        let _ = sender.send(ExecEvent::Error { error: error.body() }).await;
                        return;
                    }
                }
            }
        };
    }
}

/// Lines of a request body.
struct Lines {
    body: Body,
    buffer: Vec<u8>,
    /// How much of the buffer has no line end.
    scanned: usize,
}

impl Lines {
    /// The next line; blank ones are passed over.
    async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Error> {
        loop {
            let Some(line) = self.line().await? else { return Ok(None) };
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            return serde_json::from_slice(&line).map(Some).map_err(|error| {
                Error::new(Code::InvalidRequest, "a line of the body is not what exec takes").because(error)
            });
        }
    }

    async fn line(&mut self) -> Result<Option<Vec<u8>>, Error> {
        loop {
            if let Some(end) = self.buffer[self.scanned..].iter().position(|&byte| byte == b'\n') {
                let rest = self.buffer.split_off(self.scanned + end + 1);
                self.scanned = 0;
                return Ok(Some(std::mem::replace(&mut self.buffer, rest)));
            }
            self.scanned = self.buffer.len();
            if self.buffer.len() > MAX_EXEC_LINE {
                return Err(Error::new(
                    Code::BodyTooLarge,
                    format!("a line of the body exceeds {MAX_EXEC_LINE} bytes"),
                ));
            }
            let Some(data) = self.data().await? else {
                self.scanned = 0;
                let last = std::mem::take(&mut self.buffer);
                return Ok(Some(last).filter(|last| !last.is_empty()));
            };
            self.buffer.extend_from_slice(&data);
        }
    }

    async fn data(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
                Some(Err(error)) => {
                    return Err(Error::new(Code::InvalidRequest, "the body cannot be read").because(error));
                }
            }
        }
    }
}
