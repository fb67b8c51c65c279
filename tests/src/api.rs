//! The daemon's API, as a program would use it.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use forkling_daemon::api::types::{
    BuildEvent, ErrorAnswer, ErrorBody, ExecAnswer, ForkEvent, ForkInfo, ForkResult, ForkState, Forks,
    Health, PoolInfo, TemplateInfo, Templates, Version,
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::http::{self, Reply, Streamed};

/// A client of one daemon.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

/// What a template build said.
#[derive(Debug)]
pub struct Built {
    /// The template, or why there is none.
    pub outcome: Result<TemplateInfo, ErrorBody>,
    /// Stages begun.
    pub stages: Vec<String>,
    /// The guest's console.
    pub console: String,
}

/// A streamed answer to a request for forks. Dropped, the caller is gone.
#[derive(Debug)]
pub struct Created(Streamed);

impl Created {
    /// HTTP status.
    pub fn status(&self) -> u16 {
        self.0.status
    }
}

/// The children, in the order in which they are ready.
///
/// # Panics
/// When the answer breaks off.
impl Iterator for Created {
    type Item = ForkEvent;

    fn next(&mut self) -> Option<ForkEvent> {
        let line = self.0.line().expect("the answer comes to its end")?;
        Some(serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error} in {line:?}")))
    }
}

impl Client {
    /// Of the daemon at `socket`.
    pub fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Any request; the answer as it is.
    ///
    /// # Panics
    /// When there is no answer: a daemon answers everything.
    pub fn raw(&self, method: &str, path: &str, headers: &[(&str, &str)], body: Option<&[u8]>) -> Reply {
        http::request(&self.socket, method, path, headers, body)
            .unwrap_or_else(|error| panic!("{method} {path} got no answer: {error}"))
    }

    /// A request of JSON; the answer as a type, or the daemon's error.
    pub fn call<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<T, ErrorBody> {
        let body = body.map(|body| serde_json::to_vec(body).expect("values are JSON"));
        let reply = self.raw(method, path, &[], body.as_deref());
        if !(200..300).contains(&reply.status) {
            return Err(error_of(&reply));
        }
        let text = if reply.body.is_empty() { b"null" } else { &reply.body[..] };
        Ok(serde_json::from_slice(text).unwrap_or_else(|error| {
            panic!("{method} {path}: {error} in {:?}", String::from_utf8_lossy(text))
        }))
    }

    /// `GET /v1/version`, or nothing while the daemon is not there yet.
    pub fn version(&self) -> Option<Version> {
        let reply = http::request(&self.socket, "GET", "/v1/version", &[], None).ok()?;
        serde_json::from_slice(&reply.body).ok()
    }

    /// `GET /v1/health`.
    pub fn health(&self) -> Health {
        self.call("GET", "/v1/health", None).expect("health has no errors")
    }

    /// Builds a template and hears all of it.
    pub fn build(&self, spec: &Value) -> Built {
        let body = serde_json::to_vec(spec).expect("values are JSON");
        let reply = self.raw("POST", "/v1/templates", &[], Some(&body));
        let mut built = Built { outcome: Err(error_of(&reply)), stages: Vec::new(), console: String::new() };
        if reply.status != 200 {
            return built;
        }
        for line in reply.body.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
            match serde_json::from_slice(line).expect("an event a line") {
                BuildEvent::Stage { stage } => built.stages.push(stage),
                BuildEvent::Console { text } => built.console += &text,
                BuildEvent::Save { .. } => {}
                BuildEvent::Done { template } => built.outcome = Ok(*template),
                BuildEvent::Error { error } => built.outcome = Err(error),
            }
        }
        built
    }

    /// One template.
    pub fn template(&self, name: &str) -> Result<TemplateInfo, ErrorBody> {
        self.call("GET", &format!("/v1/templates/{name}"), None)
    }

    /// All templates.
    pub fn templates(&self) -> Vec<TemplateInfo> {
        self.call::<Templates>("GET", "/v1/templates", None).expect("lists have no errors").templates
    }

    /// Removes a template.
    pub fn remove_template(&self, name: &str) -> Result<(), ErrorBody> {
        self.call::<Value>("DELETE", &format!("/v1/templates/{name}"), None).map(drop)
    }

    /// Brings a broken template back.
    pub fn reload(&self, name: &str) -> Result<TemplateInfo, ErrorBody> {
        self.call("POST", &format!("/v1/templates/{name}/reload"), None)
    }

    /// Gives the memory of a template without forks back.
    pub fn unload(&self, name: &str) -> Result<TemplateInfo, ErrorBody> {
        self.call("POST", &format!("/v1/templates/{name}/unload"), None)
    }

    /// Asks for forks.
    pub fn create(&self, request: &Value) -> Result<Vec<ForkResult>, ErrorBody> {
        self.call("POST", "/v1/forks", Some(request))
    }

    /// Asks for forks, each answered for as soon as it is ready.
    pub fn create_streamed(&self, request: &Value) -> Created {
        let body = serde_json::to_vec(request).expect("values are JSON");
        let headers = [("accept", "application/x-ndjson")];
        let opened = Streamed::open(&self.socket, "POST", "/v1/forks", &headers, Some(&body));
        Created(opened.expect("the daemon answers"))
    }

    /// Says what the pool of a template holds.
    pub fn set_pool(&self, template: &str, settings: &Value) -> PoolInfo {
        let path = format!("/v1/templates/{template}/pool");
        self.call("PUT", &path, Some(settings)).expect("the pool is set")
    }

    /// A template's pool.
    pub fn pool(&self, template: &str) -> PoolInfo {
        self.call("GET", &format!("/v1/templates/{template}/pool"), None).expect("the template is there")
    }

    /// Keeps `count` parked forks of a template, and waits until they are there.
    pub fn park(&self, template: &str, count: u32) {
        self.set_pool(template, &json!({"low": count, "high": count}));
        crate::eventually(Duration::from_secs(60), "the pool fills", || {
            let pool = self.pool(template);
            if pool.parked == count { Ok(()) } else { Err(format!("{pool:?}")) }
        });
    }

    /// `count` forks of `template`, all of which have to be made.
    pub fn forks(&self, template: &str, count: u32) -> Vec<ForkInfo> {
        self.forks_with(&json!({"template": template, "count": count}))
    }

    /// The forks of `request`, all of which have to be made.
    pub fn forks_with(&self, request: &Value) -> Vec<ForkInfo> {
        let results = self.create(request).unwrap_or_else(|error| panic!("no forks: {error:?}"));
        let fork = |result| match result {
            ForkResult::Fork(fork) => *fork,
            ForkResult::Error(error) => panic!("a fork was not made: {error:?}; {}", self.last_words()),
        };
        results.into_iter().map(fork).collect()
    }

    /// The consoles of the dead, for a test that fails.
    fn last_words(&self) -> String {
        let dead = self.list(true).into_iter().filter(|fork| fork.state == ForkState::Died);
        dead.map(|fork| format!("{}: {:?}\n{}\n", fork.id, fork.death, self.console(&fork.id))).collect()
    }

    /// One fork of `template`.
    pub fn fork(&self, template: &str) -> ForkInfo {
        self.forks(template, 1).pop().expect("one was asked for")
    }

    /// What the daemon knows of a fork.
    pub fn inspect(&self, id: &str) -> Result<ForkInfo, ErrorBody> {
        self.call("GET", &format!("/v1/forks/{id}"), None)
    }

    /// All living forks, or all that are known.
    pub fn list(&self, all: bool) -> Vec<ForkInfo> {
        let path = if all { "/v1/forks?all=true" } else { "/v1/forks" };
        self.call::<Forks>("GET", path, None).expect("lists have no errors").forks
    }

    /// Kills a fork.
    pub fn kill(&self, id: &str) -> Result<(), ErrorBody> {
        self.call::<Value>("DELETE", &format!("/v1/forks/{id}"), None).map(drop)
    }

    /// Kills all forks.
    pub fn kill_all(&self) {
        self.call::<Value>("DELETE", "/v1/forks?all=true", None).expect("killing all has no errors");
    }

    /// Kills the forks of a template.
    pub fn kill_all_of(&self, template: &str) {
        let path = format!("/v1/forks?template={template}");
        self.call::<Value>("DELETE", &path, None).expect("killing all has no errors");
    }

    /// Makes a template of a fork.
    pub fn snapshot(&self, id: &str, name: &str) -> Result<TemplateInfo, ErrorBody> {
        self.call("POST", &format!("/v1/forks/{id}/snapshot"), Some(&json!({"name": name})))
    }

    /// Runs a command.
    pub fn exec(&self, id: &str, request: &Value) -> Result<ExecAnswer, ErrorBody> {
        self.call("POST", &format!("/v1/forks/{id}/exec"), Some(request))
    }

    /// Runs a shell line that has to succeed; its standard output without the last newline.
    pub fn sh(&self, id: &str, line: &str) -> String {
        let answer = self.exec(id, &json!({"argv": ["bash", "-c", line]}));
        let answer = answer.unwrap_or_else(|error| panic!("{line:?} in {id}: {error:?}"));
        assert_eq!(answer.end.exit_code, Some(0), "{line:?} in {id}: {answer:?}");
        answer.stdout.trim_end_matches('\n').to_owned()
    }

    /// The last output of a fork's console.
    pub fn console(&self, id: &str) -> String {
        let answer: Value =
            self.call("GET", &format!("/v1/forks/{id}/console"), None).expect("consoles are there");
        answer["text"].as_str().unwrap_or_default().to_owned()
    }
}

fn error_of(reply: &Reply) -> ErrorBody {
    match serde_json::from_slice::<ErrorAnswer>(&reply.body) {
        Ok(answer) => answer.error,
        Err(_) => ErrorBody {
            code: format!("untyped_{}", reply.status),
            message: String::from_utf8_lossy(&reply.body).into_owned(),
            cause: None,
            remediation: String::new(),
            retryable: false,
            kind: forkling_daemon::api::error::Kind::Infra,
            retry_after_s: None,
        },
    }
}
