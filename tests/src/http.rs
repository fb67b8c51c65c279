//! HTTP/1.1 on a Unix socket, blocking, a connection per request. Independent of the daemon's own client on purpose.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

/// Longest wait for an answer: template builds on an emulated host take minutes.
const PATIENCE: Duration = Duration::from_secs(600);

/// An answer.
#[derive(Debug)]
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// Without transfer coding.
    pub body: Vec<u8>,
}

impl Reply {
    /// The first header called `name`.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// Sends a request and reads the whole answer.
pub fn request(
    socket: &Path,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Option<&[u8]>,
) -> io::Result<Reply> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let sent = send(&mut stream, method, path, headers, body);
    let mut answer = Vec::new();
    // A body that is refused for its length is not read to its end; the refusal is there all the same.
    let received = stream.read_to_end(&mut answer);
    if answer.is_empty() {
        sent?;
        received?;
    }
    parse(&answer).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("no HTTP: {:?}", String::from_utf8_lossy(&answer)))
    })
}

fn send(
    stream: &mut UnixStream,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Option<&[u8]>,
) -> io::Result<()> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nhost: forkling\r\nconnection: close\r\n");
    if let Some(body) = body {
        head += &format!("content-length: {}\r\n", body.len());
        if !headers.iter().any(|(name, _)| *name == "content-type") {
            head += "content-type: application/json\r\n";
        }
    }
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += "\r\n";
    stream.write_all(&[head.as_bytes(), body.unwrap_or_default()].concat())
}

/// An answer that is read while it comes. Dropped, the connection is closed.
#[derive(Debug)]
pub struct Streamed {
    from: BufReader<UnixStream>,
    /// HTTP status.
    pub status: u16,
    body: Vec<u8>,
}

impl Streamed {
    /// Sends a request and reads the head of a chunked answer.
    pub fn open(
        socket: &Path,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&[u8]>,
    ) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        send(&mut stream, method, path, headers, body)?;
        let mut from = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if from.read_line(&mut head)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let status = parse(head.as_bytes()).ok_or(io::ErrorKind::InvalidData)?.status;
        Ok(Self { from, status, body: Vec::new() })
    }

    /// The next line of the body; `None` after the last.
    pub fn line(&mut self) -> io::Result<Option<String>> {
        loop {
            if let Some(end) = self.body.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.body.drain(..=end).collect();
                return Ok(Some(String::from_utf8_lossy(&line).trim_end().to_owned()));
            }
            let mut len = String::new();
            self.from.read_line(&mut len)?;
            let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
            let len = usize::from_str_radix(len.trim_end(), 16).map_err(invalid)?;
            let mut chunk = vec![0; len + 2];
            self.from.read_exact(&mut chunk)?;
            if len == 0 {
                return Ok(None);
            }
            self.body.extend_from_slice(&chunk[..len]);
        }
    }
}

fn parse(answer: &[u8]) -> Option<Reply> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..end]).ok()?;
    let mut lines = head.split("\r\n");
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let headers: Vec<_> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let mut reply = Reply { status, headers, body: answer[end + 4..].to_vec() };
    if reply.header("transfer-encoding") == Some("chunked") && !reply.body.is_empty() {
        reply.body = unchunk(&reply.body)?;
    }
    Some(reply)
}

/// Undoes the chunked coding (RFC 9112, 7.1); `None` when it is cut short.
fn unchunk(mut coded: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = coded.windows(2).position(|window| window == b"\r\n")?;
        let len = usize::from_str_radix(std::str::from_utf8(&coded[..end]).ok()?, 16).ok()?;
        coded = &coded[end + 2..];
        if len == 0 {
            return Some(body);
        }
        body.extend_from_slice(coded.get(..len)?);
        coded = coded.get(len + 2..)?;
    }
}
