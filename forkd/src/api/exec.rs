//! Running commands in forks.

use std::{sync::Arc, time::Duration};

use axum::{
    Json,
    body::Body,
    extract::{FromRequest, Request, State},
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
};
use forkling_proto::rpc::{self, CallError, Exit, Kind, MAX_PAYLOAD};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::{
    Shared,
    error::{Code, Error, ErrorAnswer, chain},
    extract,
    forks::{running, timeout_of},
    ndjson,
    types::{self, ExecAnswer, ExecEnd, ExecTimings, input_bytes, output_text},
};
use crate::{
    agent::{self, Connection, Event, Input},
    fork::Fork,
    limits::{AGENT_GRACE, MAX_OUTPUT, MAX_SHARED_STDIN, START_TIMEOUT},
    template::validate_environment,
};

mod stream;

/// Runs a command in a fork. With `Accept: application/x-ndjson` its output is streamed, an event a line; with the
/// same content type the body is streamed too: the request in its first line, an `ExecInput` in each further one.
#[utoipa::path(
    post, path = "/v1/forks/{id}/exec", tag = "forks",
    params(("id" = String, Path, description = "id or name")),
    request_body(content(
        (types::Exec = "application/json"),
        (types::ExecInput = "application/x-ndjson"),
    )),
    responses(
        (status = 200, content(
            (ExecAnswer = "application/json"),
            (types::ExecEvent = "application/x-ndjson"),
        )),
        (status = "default", body = ErrorAnswer)
    )
)]
pub async fn exec(
    State(shared): State<Shared>,
    extract::Name(id): extract::Name,
    headers: HeaderMap,
    request: Request<Body>,
) -> Result<Response, Error> {
    let received = Instant::now();
    let is = |name, value: &str| {
        headers.get(name).is_some_and(|header| header.as_bytes().starts_with(value.as_bytes()))
    };
    if is(header::CONTENT_TYPE, ndjson::CONTENT) {
        return stream::both_ways(&shared, &id, request.into_body()).await;
    }
    let extract::Body(body) = extract::Body::<types::Exec>::from_request(request, &()).await?;
    let command = Command::new(body)?;
    let fork = with_agent(&shared, &id)?;
    if is(header::ACCEPT, ndjson::CONTENT) {
        return stream::output(fork, command).await;
    }
    let answer = collect(&fork, command, received).await?;
    Ok(Json(answer).into_response())
}

/// A running fork that can run commands.
pub fn with_agent(shared: &Shared, id: &str) -> Result<Arc<Fork>, Error> {
    let fork = running(shared, id)?;
    match fork.template.record.spec.payload {
        types::Payload::Linux => Ok(fork),
        types::Payload::Null => Err(Error::new(Code::NoAgent, format!("fork {id} has no agent"))),
    }
}

/// A checked request.
struct Command {
    payload: Vec<u8>,
    stdin: Vec<u8>,
    timeout: Option<Duration>,
}

impl Command {
    fn new(request: types::Exec) -> Result<Self, Error> {
        let invalid = |message: String| Error::new(Code::InvalidRequest, message);
        if request.argv.first().is_none_or(String::is_empty) {
            return Err(invalid("argv is empty or its first word is".to_owned()));
        }
        let words = request.argv.iter().chain(&request.cwd).chain(&request.user);
        if words.into_iter().any(|word| word.contains('\0')) {
            return Err(invalid("argv, cwd or user has a zero byte".to_owned()));
        }
        validate_environment(request.env.iter())?;
        let timeout = timeout_of(request.timeout_ms)?;
        let exec = rpc::Exec {
            argv: request.argv,
            env: request.env.into_iter().collect(),
            cwd: request.cwd,
            user: request.user,
            timeout_ms: request.timeout_ms.unwrap_or(0),
        };
        let payload = postcard::to_allocvec(&exec).map_err(|error| invalid(error.to_string()))?;
        if payload.len() > MAX_PAYLOAD {
            let message = format!("the command has {} bytes, more than {MAX_PAYLOAD}", payload.len());
            return Err(invalid(message));
        }
        let stdin = input_bytes(request.stdin, request.stdin_base64).map_err(invalid)?.unwrap_or_default();
        Ok(Self { payload, stdin, timeout })
    }
}

/// Runs a command to its end.
async fn collect(fork: &Arc<Fork>, command: Command, received: Instant) -> Result<ExecAnswer, Error> {
    let shared = command.stdin.len() <= MAX_SHARED_STDIN;
    let connection = if shared { fork.agent().await? } else { fork.connect_agent().await? };
    let connected = received.elapsed();
    let deadline = command.timeout.map(|timeout| Instant::now() + timeout + AGENT_GRACE);
    let work = gather(&connection, &command, received);
    let outcome = match deadline {
        None => work.await,
        Some(deadline) => match timeout_at(deadline, work).await {
            Ok(outcome) => outcome,
            Err(_) => {
                let message = format!("the agent of fork {} did not end the command in its time", fork.id);
                return Err(Error::new(Code::AgentUnreachable, message));
            }
        },
    };
    match outcome {
        Ok(mut answer) => {
            answer.timings_us.connect = micros(connected);
            Ok(answer)
        }
        Err(error) => Err(call_error(fork, error).await),
    }
}

async fn gather(
    connection: &Arc<Connection>,
    command: &Command,
    received: Instant,
) -> Result<ExecAnswer, agent::Error> {
    let mut call = connection.call(Kind::Exec, &command.payload)?;
    let (mut stdout, mut stderr) = (Kept::default(), Kept::default());
    let mut timings = ExecTimings::default();
    let mut feed = std::pin::pin!(feed(call.input(), &command.stdin));
    let (mut fed, mut started) = (false, false);
    let late = Instant::now() + START_TIMEOUT;
    let exit = loop {
        tokio::select! {
            biased;
            () = sleep_until(late), if !started => return Err(agent::Error::Silent),
            // Its error shows as the end of the call too.
            _ = &mut feed, if !fed => fed = true,
            event = call.next() => match event? {
                Event::Started(_) => {
                    started = true;
                    timings.started = micros(received.elapsed());
                }
                Event::Stdout(bytes) => stdout.push(&bytes),
                Event::Stderr(bytes) => stderr.push(&bytes),
                Event::Exit(exit) => break exit,
                Event::Pong => return Err(agent::Error::Malformed("answer to a command")),
            },
        }
    };
    timings.total = micros(received.elapsed());
    let (stdout_truncated, stderr_truncated) = (stdout.truncated, stderr.truncated);
    let (stdout, stdout_base64) = output_text(stdout.bytes);
    let (stderr, stderr_base64) = output_text(stderr.bytes);
    Ok(ExecAnswer {
        stdout,
        stderr,
        stdout_base64,
        stderr_base64,
        stdout_truncated,
        stderr_truncated,
        end: end_of(exit),
        timings_us: timings,
    })
}

async fn feed(input: Input, stdin: &[u8]) -> Result<(), agent::Error> {
    input.stdin(stdin).await?;
    input.close()
}

/// Output up to [`MAX_OUTPUT`].
#[derive(Default)]
struct Kept {
    bytes: Vec<u8>,
    truncated: bool,
}

impl Kept {
    fn push(&mut self, bytes: &[u8]) {
        let room = MAX_OUTPUT - self.bytes.len();
        self.truncated |= bytes.len() > room;
        self.bytes.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }
}

fn end_of(exit: Exit) -> ExecEnd {
    match exit {
        Exit::Status(status) => ExecEnd { exit_code: Some(status), ..ExecEnd::default() },
        Exit::Signal(signal) => ExecEnd { signal: Some(signal), ..ExecEnd::default() },
        Exit::TimedOut => ExecEnd { timed_out: true, ..ExecEnd::default() },
    }
}

fn micros(duration: Duration) -> f64 {
    duration.as_nanos() as f64 / 1000.0
}

/// What a failed call means to the caller.
async fn call_error(fork: &Arc<Fork>, error: agent::Error) -> Error {
    let refused = |code, message: String| Error::new(code, message);
    match error {
        agent::Error::Refused(CallError::NotFound(what)) => {
            refused(Code::CommandNotFound, format!("{what}: not found or not executable in fork {}", fork.id))
        }
        agent::Error::Refused(CallError::NoSuchDirectory(what)) => {
            refused(Code::DirectoryNotFound, format!("{what}: no such directory in fork {}", fork.id))
        }
        agent::Error::Refused(CallError::NoSuchUser(what)) => {
            refused(Code::UserNotFound, format!("{what}: no such user in fork {}", fork.id))
        }
        agent::Error::Refused(CallError::System(text)) => {
            refused(Code::GuestRefused, format!("the kernel of fork {} refused the command", fork.id))
                .because(text)
        }
        agent::Error::Refused(CallError::BadRequest(text)) => {
            refused(Code::Internal, format!("the agent of fork {} did not understand", fork.id)).because(text)
        }
        error @ (agent::Error::Lost
        | agent::Error::Silent
        | agent::Error::Malformed(_)
        | agent::Error::Io(_)) => {
            let message = format!("the agent of fork {} did not finish the call", fork.id);
            fork.explain(Error::new(Code::AgentUnreachable, message).because(chain(&error))).await
        }
    }
}
