//! HTTP/1.1 on a kept Unix connection, blocking, one request at a time. What a request costs this side is a figure of
//! its own (`client.cpu`).

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;

/// Longest head of an answer in bytes.
const MAX_HEAD: usize = 16 << 10;

/// Bytes read at once.
const READ: usize = 64 << 10;

/// A kept connection.
#[derive(Debug)]
pub struct Connection {
    socket: PathBuf,
    stream: UnixStream,
    /// What was read and not yet used.
    received: Vec<u8>,
    /// What is read goes here first: cleared once, and not on the clock.
    buffer: Box<[u8]>,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// The body without transfer coding.
    pub body: Vec<u8>,
}

impl Reply {
    /// The body as JSON; null if there is none.
    pub fn json(&self) -> anyhow::Result<Value> {
        if self.body.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&self.body).context("the answer is not JSON")
    }

    /// Whether the request was granted.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// The body as text, for messages.
    pub fn text(&self) -> String {
        format!("{} {}", self.status, String::from_utf8_lossy(&self.body))
    }
}

/// How the body of an answer ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Length {
    Known(usize),
    Chunked,
}

impl Connection {
    /// Connects.
    pub fn open(socket: &Path) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("cannot reach the daemon at {}", socket.display()))?;
        Ok(Self {
            socket: socket.to_owned(),
            stream,
            received: Vec::with_capacity(READ),
            buffer: vec![0; READ].into(),
        })
    }

    /// Another connection to the same daemon.
    pub fn another(&self) -> anyhow::Result<Self> {
        Self::open(&self.socket)
    }

    /// Sends a request made by [`request`] and reads the whole answer; how long that took.
    pub fn timed(&mut self, request: &[u8]) -> anyhow::Result<(Duration, Reply)> {
        let began = Instant::now();
        let reply = self.exchange(request)?;
        Ok((began.elapsed(), reply))
    }

    /// Sends a request made by [`request`] and reads the whole answer.
    pub fn exchange(&mut self, request: &[u8]) -> anyhow::Result<Reply> {
        let mut body = Vec::new();
        let status = self.stream_answer(request, |bytes| {
            body.extend_from_slice(bytes);
            Ok(())
        })?;
        Ok(Reply { status, body })
    }

    /// Any request; its answer as JSON. An answer that is not a success is an error.
    pub fn call(&mut self, method: &str, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        let reply = self.exchange(&request(method, path, body))?;
        ensure!(reply.is_success(), "{method} {path}: {}", reply.text());
        reply.json()
    }

    /// A request whose answer is a JSON object a line; each is given to `each` as it comes.
    pub fn lines(
        &mut self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        mut each: impl FnMut(Value) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut rest = Vec::new();
        let status = self.stream_answer(&request(method, path, body), |bytes| {
            rest.extend_from_slice(bytes);
            while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                each(serde_json::from_slice(&line).context("a line is not JSON")?)?;
            }
            Ok(())
        })?;
        ensure!((200..300).contains(&status), "{method} {path}: {status} {}", String::from_utf8_lossy(&rest));
        Ok(())
    }

    fn stream_answer(
        &mut self,
        request: &[u8],
        mut sink: impl FnMut(&[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<u16> {
        self.stream.write_all(request).context("cannot send to the daemon")?;
        let end = self.head_end()?;
        let (status, length) = parse_head(&self.received[..end])?;
        self.received.drain(..end);
        match length {
            Length::Known(length) => self.take(length, &mut sink)?,
            Length::Chunked => self.take_chunks(&mut sink)?,
        }
        Ok(status)
    }

    /// Reads until the head is complete; its length with the empty line.
    fn head_end(&mut self) -> anyhow::Result<usize> {
        loop {
            if let Some(at) = self.received.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                return Ok(at + 4);
            }
            ensure!(self.received.len() < MAX_HEAD, "the head of an answer has no end");
            self.more()?;
        }
    }

    fn more(&mut self) -> anyhow::Result<()> {
        let count = self.stream.read(&mut self.buffer).context("cannot read from the daemon")?;
        ensure!(count > 0, "the daemon closed the connection");
        self.received.extend_from_slice(&self.buffer[..count]);
        Ok(())
    }

    fn take(
        &mut self,
        mut length: usize,
        sink: &mut impl FnMut(&[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        while length > 0 {
            if self.received.is_empty() {
                self.more()?;
            }
            let count = length.min(self.received.len());
            sink(&self.received[..count])?;
            self.received.drain(..count);
            length -= count;
        }
        Ok(())
    }

    fn take_chunks(&mut self, sink: &mut impl FnMut(&[u8]) -> anyhow::Result<()>) -> anyhow::Result<()> {
        loop {
            let line = self.line()?;
            let size = line.split(';').next().unwrap_or_default().trim();
            let size = usize::from_str_radix(size, 16).with_context(|| format!("chunk size {size:?}"))?;
            self.take(size, sink)?;
            ensure!(self.line()?.is_empty(), "a chunk is longer than it says");
            if size == 0 {
                return Ok(());
            }
        }
    }

    fn line(&mut self) -> anyhow::Result<String> {
        loop {
            if let Some(at) = self.received.windows(2).position(|bytes| bytes == b"\r\n") {
                let line = String::from_utf8_lossy(&self.received[..at]).into_owned();
                self.received.drain(..at + 2);
                return Ok(line);
            }
            self.more()?;
        }
    }
}

/// The bytes of a request.
pub fn request(method: &str, path: &str, body: Option<&Value>) -> Vec<u8> {
    let body = body.map(Value::to_string).unwrap_or_default();
    let length = body.len();
    let content = if body.is_empty() { "" } else { "content-type: application/json\r\n" };
    format!("{method} {path} HTTP/1.1\r\nhost: forkling\r\n{content}content-length: {length}\r\n\r\n{body}")
        .into_bytes()
}

/// Status, and how the body ends.
fn parse_head(head: &[u8]) -> anyhow::Result<(u16, Length)> {
    let head = std::str::from_utf8(head).context("the head of an answer is not text")?;
    let mut lines = head.split("\r\n");
    let first = lines.next().unwrap_or_default();
    let Some(status) = first.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok()) else {
        bail!("not an HTTP/1.1 answer: {first:?}");
    };
    let mut length = Length::Known(0);
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        if name.eq_ignore_ascii_case("content-length") {
            length = Length::Known(value.trim().parse().context("content-length is no number")?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            ensure!(value.trim().eq_ignore_ascii_case("chunked"), "unknown transfer coding {value:?}");
            length = Length::Chunked;
        }
    }
    Ok((status, length))
}

#[cfg(test)]
mod tests;
