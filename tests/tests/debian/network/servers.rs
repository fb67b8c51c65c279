//! Servers on the host's loopback.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use tempfile::TempDir;

/// An HTTP server: `GET /size/N` gives N bytes, `PUT /upload` the digest of what it got. Its threads end with the test's
/// process.
pub struct Web {
    port: u16,
    requests: Arc<AtomicUsize>,
}

impl Web {
    pub fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let requests = Arc::new(AtomicUsize::new(0));
        let count = requests.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, count) = (stream.unwrap(), count.clone());
                // A client that goes away is its own business.
                thread::spawn(move || serve(stream, &count).ok());
            }
        });
        Self { port, requests }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Requests whose header came whole.
    pub fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    /// SHA-256 of what `/size/N` gives.
    pub fn digest(&self, size: usize) -> String {
        sha256(|out| content(size, out))
    }
}

fn content(size: usize, out: &mut dyn Write) -> std::io::Result<()> {
    let block: Vec<u8> = b"0123456789".iter().copied().cycle().take(100_000).collect();
    let mut left = size;
    while left > 0 {
        let part = left.min(block.len());
        out.write_all(&block[..part])?;
        left -= part;
    }
    Ok(())
}

fn sha256(feed: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> String {
    let mut child =
        Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("sha256sum");
    feed(&mut child.stdin.take().unwrap()).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8_lossy(&output.stdout)[..64].to_owned()
}

fn serve(mut stream: TcpStream, requests: &AtomicUsize) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut first, mut length) = (String::new(), 0);
    reader.read_line(&mut first)?;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let line = line.trim().to_ascii_lowercase();
        if let Some(value) = line.strip_prefix("content-length: ") {
            length = value.parse().unwrap_or(0);
        }
        if line == "expect: 100-continue" {
            stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        if line.is_empty() {
            break;
        }
    }
    requests.fetch_add(1, Ordering::SeqCst);
    let target = first.split(' ').nth(1).unwrap_or_default();
    let size = target.strip_prefix("/size/").and_then(|size| size.split('?').next()?.parse().ok());
    let head = |len| format!("HTTP/1.1 200 OK\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n");
    if let Some(size) = size {
        stream.write_all(head(size).as_bytes())?;
        return content(size, &mut stream);
    }
    let mut body = reader.take(length);
    let digest = sha256(|out| std::io::copy(&mut body, out).map(drop));
    stream.write_all(head(digest.len()).as_bytes())?;
    stream.write_all(digest.as_bytes())
}

/// A TLS server that answers every request with what was agreed on, and its own certificate.
pub struct Secure {
    process: Child,
    directory: TempDir,
    port: u16,
}

impl Secure {
    pub fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
        let name = super::HOST;
        let made = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"])
            .args(["-subj", &format!("/CN={name}"), "-addext", &format!("subjectAltName=DNS:{name}")])
            .args(["-days", "30", "-keyout", &path("key.pem"), "-out", &path("cert.pem")])
            .output()
            .expect("openssl is there");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        // openssl(1) cannot choose a port itself.
        let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let process = Command::new("openssl")
            .args(["s_server", "-quiet", "-www", "-accept", &format!("127.0.0.1:{port}")])
            .args(["-cert", &path("cert.pem"), "-key", &path("key.pem")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let server = Self { process, directory, port };
        forkling_tests::eventually(Duration::from_secs(60), "openssl listens", || {
            TcpStream::connect(("127.0.0.1", port)).map(drop).map_err(|error| error.to_string())
        });
        server
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn certificate(&self) -> PathBuf {
        self.directory.path().join("cert.pem")
    }
}

impl Drop for Secure {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Port of a server that sends every datagram back.
pub fn udp_echo() -> u16 {
    let socket = UdpSocket::bind(("127.0.0.1", 0)).unwrap();
    let port = socket.local_addr().unwrap().port();
    thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..len], from);
        }
    });
    port
}
