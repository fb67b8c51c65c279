//! A small HTTP/1.1 client on a Unix socket.

use std::{fmt::Write as _, io, path::PathBuf};

use axum::http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{
    body::{Bytes, Incoming},
    client::conn::http1,
    upgrade::Upgraded,
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use crate::api::types::{ErrorAnswer, ErrorBody};

/// A request body.
pub type RequestBody = BoxBody<Bytes, io::Error>;

/// Why a command failed.
#[derive(Debug)]
pub enum Failure {
    /// The daemon said so.
    Api(Box<ErrorBody>),
    /// The daemon cannot be reached.
    Unreachable {
        /// Its socket.
        socket: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The connection broke, or the daemon is of another version.
    Broken(String),
    /// Nothing to do with the daemon.
    Local(String),
}

/// Connects for each request: a command makes one or two.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// Of the daemon at `socket`.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// GET.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        parse(&self.whole(Method::GET, path, None::<&()>).await?)
    }

    /// POST of JSON.
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, Failure> {
        parse(&self.whole(Method::POST, path, Some(body)).await?)
    }

    /// PUT of JSON.
    pub async fn put<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, Failure> {
        parse(&self.whole(Method::PUT, path, Some(body)).await?)
    }

    /// DELETE without an answer.
    pub async fn delete(&self, path: &str) -> Result<(), Failure> {
        self.whole(Method::DELETE, path, None::<&()>).await.map(drop)
    }

    /// DELETE with an answer.
    pub async fn delete_many<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        parse(&self.whole(Method::DELETE, path, None::<&()>).await?)
    }

    async fn whole(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Bytes, Failure> {
        let response = self.send(method, path, json_body(body), &[]).await?;
        Ok(response.into_body().collect().await.map_err(broken)?.to_bytes())
    }

    /// Sends a request and returns a successful response, its body unread.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        body: RequestBody,
        headers: &[(header::HeaderName, &str)],
    ) -> Result<Response<Incoming>, Failure> {
        let response = self.answer(method, path, body, headers).await?;
        if response.status().is_success() {
            return Ok(response);
        }
        Err(refusal(response).await)
    }

    /// Turns a connection of its own into a raw stream by `GET path`.
    pub async fn upgrade(&self, path: &str, protocol: &str) -> Result<TokioIo<Upgraded>, Failure> {
        let headers = [(header::CONNECTION, "Upgrade"), (header::UPGRADE, protocol)];
        let response = self.answer(Method::GET, path, json_body(None::<&()>), &headers).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(refusal(response).await);
        }
        Ok(TokioIo::new(hyper::upgrade::on(response).await.map_err(broken)?))
    }

    async fn answer(
        &self,
        method: Method,
        path: &str,
        body: RequestBody,
        headers: &[(header::HeaderName, &str)],
    ) -> Result<Response<Incoming>, Failure> {
        let unreachable = |cause| Failure::Unreachable { socket: self.socket.clone(), cause };
        let stream = UnixStream::connect(&self.socket).await.map_err(unreachable)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        tokio::spawn(connection.with_upgrades());
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, "forkling");
        for (name, value) in headers {
            request = request.header(name, *value);
        }
        let request = request.body(body).map_err(broken)?;
        sender.send_request(request).await.map_err(broken)
    }
}

/// What an answer that is no success says.
async fn refusal(response: Response<Incoming>) -> Failure {
    let status = response.status();
    let body = match response.into_body().collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => return broken(error),
    };
    match serde_json::from_slice::<ErrorAnswer>(&body) {
        Ok(answer) => Failure::Api(Box::new(answer.error)),
        Err(_) => Failure::Broken(format!("the daemon answered {status} without a reason")),
    }
}

/// A body of JSON; empty without one.
pub fn json_body(body: Option<&impl Serialize>) -> RequestBody {
    let bytes = body.map(|body| serde_json::to_vec(body).expect("requests are JSON")).unwrap_or_default();
    Full::new(Bytes::from(bytes)).map_err(|never| match never {}).boxed()
}

/// The events of a streamed response.
pub struct Events {
    body: Incoming,
    buffer: Vec<u8>,
}

impl Events {
    /// Of a response.
    pub fn new(response: Response<Incoming>) -> Self {
        Self { body: response.into_body(), buffer: Vec::new() }
    }

    /// The next event; `None` at the end.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Failure> {
        loop {
            if let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return parse(&line).map(Some);
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    if let Ok(data) = frame.map_err(broken)?.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(bytes)
        .map_err(|error| Failure::Broken(format!("the daemon's answer is not understood: {error}")))
}

/// What became of a connection.
pub fn broken(error: impl std::error::Error) -> Failure {
    Failure::Broken(format!("the connection to the daemon broke: {}", crate::api::error::chain(&error)))
}

/// `text` as one segment of a path.
pub fn segment(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' => out.push(char::from(byte)),
            b'.' if text != "." && text != ".." => out.push('.'),
            other => write!(out, "%{other:02X}").expect("strings take all"),
        }
    }
    out
}
