//! `forkling exec` and `forkling run`: the command's streams are this process's, its status too.

use std::{io, process::ExitCode};

use axum::http::{Method, header};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use http_body_util::BodyExt;
use hyper::body::{Bytes, Frame};
use serde::Serialize;
use tokio::{
    io::AsyncReadExt,
    sync::{mpsc, oneshot},
};

use super::{
    client::{Client, Events, Failure, segment},
    fork::{Options, variable},
    output::Output,
};
use crate::api::types::{self, ErrorBody, ExecEnd, ExecEvent, ExecInput, ForkResult};

/// Bytes of standard input in one line of the request.
const CHUNK: usize = 32 << 10;

/// Exit status of a command whose time was over, as timeout(1) gives it.
const TIMED_OUT: u8 = 124;

/// Added to the number of the signal that killed a command, as shells do.
const SIGNALLED: u8 = 128;

/// Options of a command.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct CommandOptions {
    /// Working directory
    #[arg(long)]
    cwd: Option<String>,
    /// User name or number
    #[arg(short, long)]
    user: Option<String>,
    /// Kill it after so many seconds
    #[arg(short, long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<u64>,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    argv: Vec<String>,
}

/// Seconds with a fraction, as milliseconds.
fn seconds(text: &str) -> Result<u64, String> {
    let value: f64 = text.parse().map_err(|_| format!("{text:?} is not a number of seconds"))?;
    let milliseconds = (value * 1000.0).round();
    if (1.0..=1e12).contains(&milliseconds) {
        Ok(milliseconds as u64)
    } else {
        Err("out of range".to_owned())
    }
}

/// Runs a command in a fork.
#[derive(Debug, clap::Args)]
pub struct Exec {
    /// The fork's id or name
    id: String,
    /// Environment of the command
    #[arg(short, long = "env", value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    #[command(flatten)]
    command: CommandOptions,
}

/// Makes a fork for one command.
#[derive(Debug, clap::Args)]
pub struct Run {
    /// The template
    template: String,
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    command: CommandOptions,
}

impl Exec {
    /// Runs it.
    pub async fn run(self, client: &Client, output: Output) -> Result<ExitCode, Failure> {
        execute(client, &self.id, self.command, self.env, output).await
    }
}

impl Run {
    /// Runs it.
    pub async fn run(self, client: &Client, output: Output) -> Result<ExitCode, Failure> {
        let request = self.options.request(self.template);
        let results: Vec<ForkResult> = client.post("/v1/forks", &request).await?;
        let fork = match results.into_iter().next() {
            Some(ForkResult::Fork(fork)) => fork,
            Some(ForkResult::Error(error)) => return Err(Failure::Api(Box::new(error))),
            None => return Err(Failure::Broken("the daemon answered with no fork".to_owned())),
        };
        let outcome = tokio::select! {
            outcome = execute(client, &fork.id, self.command, Vec::new(), output) => outcome,
            _ = tokio::signal::ctrl_c() => Ok(ExitCode::from(SIGNALLED + 2)),
        };
        let killed = client.delete(&format!("/v1/forks/{}", segment(&fork.id))).await;
        let status = outcome?;
        killed.map(|()| status)
    }
}

async fn execute(
    client: &Client,
    id: &str,
    command: CommandOptions,
    env: Vec<(String, String)>,
    output: Output,
) -> Result<ExitCode, Failure> {
    let request = types::Exec {
        argv: command.argv,
        env: env.into_iter().collect(),
        cwd: command.cwd,
        user: command.user,
        timeout_ms: command.timeout,
        ..types::Exec::default()
    };
    let path = format!("/v1/forks/{}/exec", segment(id));
    let ndjson = "application/x-ndjson";
    let headers = [(header::CONTENT_TYPE, ndjson), (header::ACCEPT, ndjson)];
    let (accepted, go) = oneshot::channel();
    let response = client.send(Method::POST, &path, input_body(&request, go), &headers).await?;
    let _ = accepted.send(());
    let mut events = Events::new(response);
    while let Some(event) = events.next::<ExecEvent>().await? {
        if output.json {
            output.print(&event);
        }
        match event {
            ExecEvent::Started { .. } => {}
            ExecEvent::Stdout(data) if !output.json => pass(&mut io::stdout(), &data.bytes())?,
            ExecEvent::Stderr(data) if !output.json => pass(&mut io::stderr(), &data.bytes())?,
            ExecEvent::Stdout(_) | ExecEvent::Stderr(_) => {}
            ExecEvent::Exit(end) => return Ok(status(end)),
            ExecEvent::Error { error } => return Err(failed(error, output)),
        }
    }
    Err(Failure::Broken("the daemon ended before the command did".to_owned()))
}

fn failed(error: ErrorBody, output: Output) -> Failure {
    if output.json {
        // Printed as an event already; what follows is the exit status only.
        return Failure::Broken("the command did not end".to_owned());
    }
    Failure::Api(Box::new(error))
}

fn pass(to: &mut impl io::Write, bytes: &[u8]) -> Result<(), Failure> {
    to.write_all(bytes)
        .and_then(|()| to.flush())
        .map_err(|error| Failure::Local(format!("cannot write: {error}")))
}

fn status(end: ExecEnd) -> ExitCode {
    let code = match (end.exit_code, end.signal) {
        (Some(code), _) => u8::try_from(code & 0xff).unwrap_or(1),
        (None, Some(signal)) => SIGNALLED.saturating_add(u8::try_from(signal).unwrap_or(0)),
        (None, None) => TIMED_OUT,
    };
    ExitCode::from(code)
}

/// The request in the first line, standard input in the following ones, as it comes.
fn input_body(request: &types::Exec, go: oneshot::Receiver<()>) -> super::client::RequestBody {
    let (sender, lines) = mpsc::channel(4);
    let first = line(request);
    tokio::spawn(async move {
        // Nothing is read from standard input for a command that is refused.
        if sender.send(first).await.is_err() || go.await.is_err() {
            return;
        }
        let mut stdin = tokio::io::stdin();
        let mut buffer = vec![0; CHUNK];
        while let Ok(count @ 1..) = stdin.read(&mut buffer).await {
            let bytes = &buffer[..count];
            let input = match std::str::from_utf8(bytes) {
                Ok(text) => ExecInput { stdin: Some(text.to_owned()), ..ExecInput::default() },
                Err(_) => ExecInput { stdin_base64: Some(STANDARD.encode(bytes)), ..ExecInput::default() },
            };
            if sender.send(line(&input)).await.is_err() {
                return;
            }
        }
    });
    Lines(lines).boxed()
}

fn line(value: &impl Serialize) -> Bytes {
    let mut line = serde_json::to_vec(value).expect("requests are JSON");
    line.push(b'\n');
    line.into()
}

struct Lines(mpsc::Receiver<Bytes>);

impl hyper::body::Body for Lines {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        self.0.poll_recv(context).map(|line| line.map(|line| Ok(Frame::data(line))))
    }
}
