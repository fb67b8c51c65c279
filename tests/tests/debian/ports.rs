//! Servers in a guest without a network, reached through forwarded ports and tunnels.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use forkling_daemon::api::types::{PortConnections, PortInfo, Ports};
use forkling_tests::{api::Client, daemon::Daemon, eventually, proc, program};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::guest;

mod protocols;

/// Longest silence on an emulated host.
const PATIENCE: Duration = Duration::from_secs(300);

/// Answers an upgrade, as a WebSocket server would, and then echoes until the client ends its direction.
const UPGRADES: &str = "
import socket, threading
def serve(c):
    head = b''
    while not head.endswith(b'\\r\\n\\r\\n'):
        head += c.recv(1)
    c.sendall(b'HTTP/1.1 101 Switching Protocols\\r\\nUpgrade: echo\\r\\nConnection: Upgrade\\r\\n\\r\\n')
    while data := c.recv(1 << 16):
        c.sendall(data)
    c.sendall(b'bye')
    c.close()
s = socket.create_server(('127.0.0.1', 8001))
while True:
    threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
";

/// Starts a Python program in a fork and leaves it running.
pub fn in_background(client: &Client, fork: &str, script: &str) {
    let line = "printf %s \"$SCRIPT\" >/run/script.$$.py; setsid python3 /run/script.$$.py >/dev/null 2>&1 </dev/null & exit 0";
    let request = json!({"argv": ["bash", "-c", line], "env": {"SCRIPT": script}});
    let answer = client.exec(fork, &request).unwrap();
    assert_eq!(answer.end.exit_code, Some(0), "{answer:?}");
}

/// A fork that serves files on 8000 and upgrades on 8001.
fn serving() -> (Daemon, String) {
    let daemon = guest::daemon();
    let fork = daemon.fork(guest::ONE).id;
    in_background(&daemon, &fork, UPGRADES);
    let files = "mkdir /tmp/www && echo hello from $(hostname) >/tmp/www/index.html \
                 && head -c 3000000 /dev/urandom >/tmp/www/big && cd /tmp/www \
                 && (setsid python3 -m http.server 8000 --bind 127.0.0.1 >/dev/null 2>&1 </dev/null &)";
    daemon.sh(&fork, files);
    for port in [8000, 8001] {
        let wait = format!("until (exec 3<>/dev/tcp/127.0.0.1/{port}) 2>/dev/null; do sleep 0.2; done");
        daemon.sh(&fork, &wait);
    }
    (daemon, fork)
}

fn forward(client: &Client, fork: &str, request: &Value) -> PortInfo {
    client.call("POST", &format!("/v1/forks/{fork}/ports"), Some(request)).unwrap()
}

fn counts(client: &Client, fork: &str, id: &str) -> PortConnections {
    let ports: Ports = client.call("GET", &format!("/v1/forks/{fork}/ports"), None).unwrap();
    ports.ports.iter().find(|port| port.id == id).unwrap().connections
}

fn connect(port: &PortInfo) -> TcpStream {
    let stream = TcpStream::connect(port.host.as_deref().unwrap()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// The body of a page of the guest's server.
fn get(mut stream: impl Read + Write, path: &str) -> Vec<u8> {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n").expect("a head");
    assert!(answer.starts_with(b"HTTP/1.0 200") || answer.starts_with(b"HTTP/1.1 200"));
    answer.split_off(end + 4)
}

/// Asks for a tunnel; its stream and the head of the answer.
fn tunnel(daemon: &Daemon, fork: &str, port: u16) -> (UnixStream, String) {
    let mut stream = UnixStream::connect(daemon.settings.socket()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = format!("GET /v1/forks/{fork}/tunnel?port={port} HTTP/1.1\r\nHost: x\r\n");
    write!(stream, "{head}Connection: Upgrade\r\nUpgrade: forkling-tunnel\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        answer.push(byte[0]);
    }
    (stream, String::from_utf8(answer).unwrap())
}

/// Upgrades a stream to the guest's echo, uses it, and ends this direction.
fn upgrade_and_echo(mut stream: impl Read + Write, end: impl FnOnce()) {
    stream.write_all(b"GET /chat HTTP/1.1\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\n").unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    assert!(head.starts_with(b"HTTP/1.1 101 "));
    for words in [&b"\x81\x05hello"[..], b"\0\xff\n", &[7; 3000]] {
        stream.write_all(words).unwrap();
        let mut heard = vec![0; words.len()];
        stream.read_exact(&mut heard).unwrap();
        assert_eq!(heard, words);
    }
    end();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"bye", "this direction ended, the other did not");
}

#[test]
fn forwarded_ports() {
    let (daemon, fork) = serving();
    let files = forward(&daemon, &fork, &json!({"guest_port": 8000}));
    let page = format!("hello from {}\n", daemon.inspect(&fork).unwrap().hostname);
    assert_eq!(get(connect(&files), "/"), page.as_bytes());
    let start = Instant::now();
    let big = get(connect(&files), "/big");
    println!("3 MB by a forwarded port: {:?}", start.elapsed());
    let sum = daemon.sh(&fork, "sha256sum </tmp/www/big | cut -c1-64");
    assert_eq!((big.len(), sha256(&big)), (3_000_000, sum));
    std::thread::scope(|scope| {
        for _ in 0..50 {
            scope.spawn(|| assert_eq!(get(connect(&files), "/"), page.as_bytes()));
        }
    });
    eventually(PATIENCE, "all connections are counted as ended", || {
        let counts = counts(&daemon, &fork, &files.id);
        if counts == (PortConnections { open: 0, total: 52, refused: 0 }) {
            Ok(())
        } else {
            Err(format!("{counts:?}"))
        }
    });

    let unix = forward(&daemon, &fork, &json!({"guest_port": 8000, "unix": "files"}));
    let stream = UnixStream::connect(unix.unix.as_deref().unwrap()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(get(stream, "/"), page.as_bytes());

    let upgrades = forward(&daemon, &fork, &json!({"guest_port": 8001, "host": "127.0.0.1:0"}));
    let stream = connect(&upgrades);
    upgrade_and_echo(&stream, || stream.shutdown(Shutdown::Write).unwrap());

    let nobody = forward(&daemon, &fork, &json!({"guest_port": 9}));
    assert_eq!(connect(&nobody).read(&mut [0]).unwrap_or(0), 0);
    eventually(PATIENCE, "the refusal is counted", || {
        let counts = counts(&daemon, &fork, &nobody.id);
        if (counts.refused, counts.open) == (1, 0) { Ok(()) } else { Err(format!("{counts:?}")) }
    });

    let mut held = connect(&upgrades);
    eventually(PATIENCE, "the connection is counted", || {
        let counts = counts(&daemon, &fork, &upgrades.id);
        if counts.open == 1 { Ok(()) } else { Err(format!("{counts:?}")) }
    });
    daemon.call::<Value>("DELETE", &format!("/v1/forks/{fork}/ports/{}", upgrades.id), None).unwrap();
    assert_eq!(held.read(&mut [0]).unwrap_or(0), 0, "the connection ends with its port");
    assert!(TcpStream::connect(upgrades.host.as_deref().unwrap()).is_err());

    let mut held = connect(&files);
    held.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    daemon.kill(&fork).unwrap();
    assert_eq!(held.read(&mut [0]).unwrap_or(0), 0);
    eventually(PATIENCE, "ports go with their fork", || {
        let there = TcpStream::connect(files.host.as_deref().unwrap()).is_ok()
            || std::path::Path::new(unix.unix.as_deref().unwrap()).exists();
        if there { Err("they are there".to_owned()) } else { Ok(()) }
    });
}

fn sha256(data: &[u8]) -> String {
    let mut child = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(data).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap()[..64].to_owned()
}

#[test]
fn ports_that_are_taken_or_too_many() {
    let daemon = guest::daemon();
    let fork = daemon.fork(guest::ONE).id;
    let refused = |request: Value| {
        let path = format!("/v1/forks/{fork}/ports");
        let error = daemon.call::<Value>("POST", &path, Some(&request)).unwrap_err();
        assert!(!error.remediation.is_empty(), "{error:?}");
        error.code
    };
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    assert_eq!(refused(json!({"guest_port": 80, "host": address})), "address_in_use");
    forward(&daemon, &fork, &json!({"guest_port": 80, "unix": "one"}));
    assert_eq!(refused(json!({"guest_port": 80, "unix": "one"})), "address_in_use");
    assert_eq!(refused(json!({"guest_port": 80, "host": "127.0.0.1:99999"})), "invalid_request");
    for _ in 1..64 {
        forward(&daemon, &fork, &json!({"guest_port": 80}));
    }
    assert_eq!(refused(json!({"guest_port": 80})), "too_many_ports");
    daemon.call::<Value>("DELETE", &format!("/v1/forks/{fork}/ports/1"), None).unwrap();
    eventually(PATIENCE, "the name is free", || {
        let path = format!("/v1/forks/{fork}/ports");
        let made = daemon.call::<PortInfo>("POST", &path, Some(&json!({"guest_port": 80, "unix": "one"})));
        made.map(drop).map_err(|error| format!("{error:?}"))
    });
}

#[test]
fn tunnels() {
    let (daemon, fork) = serving();
    let (stream, head) = tunnel(&daemon, &fork, 8000);
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    assert!(head.to_ascii_lowercase().contains("upgrade: forkling-tunnel"), "{head}");
    let big = get(stream, "/big");
    assert_eq!(sha256(&big), daemon.sh(&fork, "sha256sum </tmp/www/big | cut -c1-64"));
    let (stream, _) = tunnel(&daemon, &fork, 8001);
    upgrade_and_echo(&stream, || stream.shutdown(Shutdown::Write).unwrap());
    let (_, head) = tunnel(&daemon, &fork, 9);
    assert!(head.starts_with("HTTP/1.1 502 "), "{head}");
    let path = format!("/v1/forks/{fork}/tunnel?port=9");
    let reply = daemon.raw("GET", &path, &[("connection", "Upgrade"), ("upgrade", "forkling-tunnel")], None);
    let answer: Value = serde_json::from_slice(&reply.body).unwrap();
    assert_eq!(answer["error"]["code"], "guest_port_closed");
    let (mut held, _) = tunnel(&daemon, &fork, 8001);
    daemon.kill(&fork).unwrap();
    assert_eq!(held.read(&mut [0]).unwrap_or(0), 0, "a tunnel ends with its fork");
}

#[test]
fn the_command_line_forwards_and_tunnels() {
    let (daemon, fork) = serving();
    let socket = daemon.settings.socket();
    let forkling = |args: &[&str]| {
        let mut command = Command::new(program("forkling"));
        command.arg("--socket").arg(&socket).args(args).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.spawn().unwrap()
    };
    let page = format!("hello from {}\n", daemon.inspect(&fork).unwrap().hostname);
    let mut child = forkling(&["port-forward", &fork, ":8000", ":8001"]);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let addresses: Vec<String> =
        lines.by_ref().take(2).map(|line| line.unwrap().split(' ').nth(1).unwrap().to_owned()).collect();
    let stream = TcpStream::connect(&addresses[0]).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(get(stream, "/"), page.as_bytes());
    proc::signal(child.id().cast_signed(), Signal::INT);
    assert!(child.wait().unwrap().success());
    assert!(addresses.iter().all(|address| TcpStream::connect(address).is_err()));
    let ports: Ports = daemon.call("GET", &format!("/v1/forks/{fork}/ports"), None).unwrap();
    assert!(ports.ports.is_empty(), "{ports:?}");

    let mut child = forkling(&["tunnel", &fork, "8000"]);
    child.stdin.take().unwrap().write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert!(output.stdout.ends_with(page.as_bytes()), "{}", output.stdout.escape_ascii());
    let output = forkling(&["tunnel", &fork, "9"]).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(125));
}
