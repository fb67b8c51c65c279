//! An agent that serves on a Unix socket, and the host's end of a connection to it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use forkling_proto::rpc::{CallError, Exec, Exit, HEADER_LEN, Header, Kind, frame};

/// Name of the socket for forwarded streams.
pub const FORWARD: &str = "forward.sock";

pub struct Agent {
    pub process: Child,
    directory: tempfile::TempDir,
}

impl Agent {
    pub fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.sock");
        let process = Command::new(env!("CARGO_BIN_EXE_forkling-agent"))
            .arg("--serve-unix")
            .arg(&path)
            .arg(directory.path().join(FORWARD))
            .spawn()
            .unwrap();
        // The path is there a moment before somebody listens.
        wait_until("the agent to listen", || UnixStream::connect(&path).is_ok());
        let agent = Self { process, directory };
        // Somebody listens a moment before all descriptors are there that an idle agent has.
        agent.connect().run(argv(&["/bin/true"]));
        agent
    }

    pub fn connect(&self) -> Host {
        let stream = UnixStream::connect(self.directory.path().join("agent.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Host { stream, next: 0 }
    }

    /// A stream to TCP port `port` of the loopback; the verdict is not read.
    #[allow(dead_code, reason = "not every test binary forwards")]
    pub fn forward(&self, port: u16) -> UnixStream {
        let mut stream = UnixStream::connect(self.directory.path().join(FORWARD)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.write_all(&forkling_proto::forward::header(port)).unwrap();
        stream
    }

    pub fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    /// How many descriptors the agent has; a closed connection's is among them until the agent has heard of it.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.process.id())).unwrap().count()
    }

    pub fn children(&self) -> String {
        let id = self.process.id();
        std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub struct Host {
    pub stream: UnixStream,
    next: u32,
}

#[derive(Debug, Default)]
pub struct Outcome {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit: Option<Exit>,
    pub error: Option<CallError>,
}

impl Outcome {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap().trim()
    }
}

impl Host {
    pub fn send(&mut self, call: u32, kind: Kind, payload: &[u8]) {
        self.stream.write_all(&frame(call, kind, payload)).unwrap();
    }

    pub fn receive(&mut self) -> (Header, Vec<u8>) {
        receive(&mut self.stream).unwrap()
    }

    pub fn start(&mut self, exec: &Exec) -> u32 {
        self.next += 1;
        self.send(self.next, Kind::Exec, &postcard::to_allocvec(exec).unwrap());
        self.next
    }

    /// Waits until the call was started.
    pub fn started(&mut self, call: u32) -> u32 {
        let (header, payload) = self.receive();
        assert_eq!((header.call, header.kind), (call, Kind::Started));
        postcard::from_bytes(&payload).unwrap()
    }

    /// Collects the frames of one call until its end; there must be no others.
    pub fn finish(&mut self, call: u32) -> Outcome {
        let mut outcome = Outcome::default();
        loop {
            let (header, payload) = self.receive();
            assert_eq!(header.call, call);
            if outcome.take(header.kind, &payload) {
                return outcome;
            }
        }
    }

    pub fn run(&mut self, exec: Exec) -> Outcome {
        let call = self.start(&exec);
        self.send(call, Kind::Stdin, &[]);
        self.finish(call)
    }

    pub fn shell(&mut self, script: &str) -> Outcome {
        self.run(shell(script))
    }

    pub fn ping(&mut self) {
        self.send(u32::MAX, Kind::Ping, b"nonce");
        let (header, payload) = self.receive();
        assert_eq!(
            (header.call, header.kind, payload.as_slice()),
            (u32::MAX, Kind::Pong, b"nonce".as_slice())
        );
    }
}

impl Outcome {
    pub fn take(&mut self, kind: Kind, payload: &[u8]) -> bool {
        match kind {
            Kind::Started => {}
            Kind::Stdout => self.stdout.extend_from_slice(payload),
            Kind::Stderr => self.stderr.extend_from_slice(payload),
            Kind::Exit => self.exit = Some(postcard::from_bytes(payload).unwrap()),
            Kind::Error => self.error = Some(postcard::from_bytes(payload).unwrap()),
            other => panic!("unexpected {other:?}"),
        }
        self.exit.is_some() || self.error.is_some()
    }
}

pub fn receive(stream: &mut impl Read) -> std::io::Result<(Header, Vec<u8>)> {
    let mut header = [0; HEADER_LEN];
    stream.read_exact(&mut header)?;
    let header = Header::decode(&header).unwrap();
    let mut payload = vec![0; header.len as usize];
    stream.read_exact(&mut payload)?;
    Ok((header, payload))
}

pub fn argv(words: &[&str]) -> Exec {
    Exec { argv: words.iter().map(|word| (*word).to_owned()).collect(), ..Exec::default() }
}

pub fn shell(script: &str) -> Exec {
    argv(&["/bin/sh", "-c", script])
}

pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process is there and not a zombie.
pub fn is_alive(pid: &str) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}
