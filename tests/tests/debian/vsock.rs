//! A fork's vsock as an orchestrator uses it that knows Firecracker: `CONNECT <port>`, `OK <port>`, and the guest's own
//! connections to `<path>_<port>`.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use forkling_daemon::api::types::VsockInfo;
use forkling_tests::{api::Client, daemon::Daemon};
use serde_json::{Value, json};

use crate::guest;

/// Longest silence on an emulated host.
const PATIENCE: Duration = Duration::from_secs(300);

/// Echoes until the client ends its direction, then ends its own.
const ECHO: &str = "
import socket, threading
def echo(c):
    while data := c.recv(1 << 18):
        c.sendall(data)
    c.shutdown(socket.SHUT_WR)
    c.close()
s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
s.bind((socket.VMADDR_CID_ANY, 5000))
s.listen(128)
while True:
    threading.Thread(target=echo, args=(s.accept()[0],), daemon=True).start()
";

/// Says a line to a port of the host, ends its direction, and prints what it hears.
const CALL: &str = "
import socket, sys
s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
try:
    s.connect((socket.VMADDR_CID_HOST, int(sys.argv[1])))
except OSError as error:
    print(type(error).__name__)
    sys.exit()
s.sendall(sys.argv[2].encode())
s.shutdown(socket.SHUT_WR)
heard = b''
while data := s.recv(4096):
    heard += data
print(heard.decode())
";

fn open(client: &Client, fork: &str) -> PathBuf {
    let opened: VsockInfo = client.call("POST", &format!("/v1/forks/{fork}/vsock"), None).unwrap();
    opened.path.into()
}

/// Connects as Firecracker's documentation says.
fn connect(path: &Path, port: u32) -> Option<UnixStream> {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(1) if byte[0] == b'\n' => break,
            Ok(1) => line.push(byte[0]),
            // Closed, perhaps with our line unread.
            _ => return None,
        }
    }
    let line = String::from_utf8(line).unwrap();
    let number = line.strip_prefix("OK ").unwrap_or_else(|| panic!("{line:?}"));
    assert!(number.parse::<u32>().is_ok(), "{line:?}");
    Some(stream)
}

fn start_echo(client: &Client, fork: &str, path: &Path) {
    crate::ports::in_background(client, fork, ECHO);
    let start = Instant::now();
    while connect(path, 5000).is_none() {
        assert!(start.elapsed() < PATIENCE, "the echo server does not come up");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn call(client: &Client, fork: &str, port: u32, words: &str) -> String {
    let argv = json!({"argv": ["python3", "-c", CALL, port.to_string(), words]});
    let answer = client.exec(fork, &argv).unwrap();
    assert_eq!(answer.end.exit_code, Some(0), "{answer:?}");
    answer.stdout.trim_end().to_owned()
}

/// Sends `len` bytes through an echo, ends its direction, and compares what comes back.
fn echo(mut stream: UnixStream, seed: u8, len: usize) {
    let mut writer = stream.try_clone().unwrap();
    let block: Vec<u8> = (0..65_536_u32).map(|at| (at.wrapping_mul(31) >> 3) as u8 ^ seed).collect();
    let sent = std::thread::spawn(move || {
        let mut hasher = blake3::Hasher::new();
        for number in 0..len / block.len() {
            let mut block = block.clone();
            block[..8].copy_from_slice(&(number as u64).to_le_bytes());
            hasher.update(&block);
            writer.write_all(&block).unwrap();
        }
        writer.shutdown(Shutdown::Write).unwrap();
        hasher.finalize()
    });
    let (mut hasher, mut buffer, mut received) = (blake3::Hasher::new(), vec![0; 65_536], 0);
    loop {
        match stream.read(&mut buffer).unwrap() {
            0 => break,
            count => {
                hasher.update(&buffer[..count]);
                received += count;
            }
        }
    }
    assert_eq!(received, len, "stream {seed}");
    assert_eq!(hasher.finalize(), sent.join().unwrap(), "stream {seed}");
}

#[test]
fn a_hundred_streams_echo_at_once_one_of_them_64_mib() {
    let daemon = guest::daemon();
    let fork = daemon.fork(guest::ONE).id;
    let path = open(&daemon, &fork);
    assert!(connect(&path, 5000).is_none(), "nobody listens yet");
    start_echo(&daemon, &fork, &path);

    let mut pipelined = UnixStream::connect(&path).unwrap();
    pipelined.set_read_timeout(Some(PATIENCE)).unwrap();
    pipelined.write_all(b"CONNECT 5000\nno waiting").unwrap();
    pipelined.shutdown(Shutdown::Write).unwrap();
    let mut heard = String::new();
    pipelined.read_to_string(&mut heard).unwrap();
    let (ok, rest) = heard.split_once('\n').unwrap();
    assert!(ok.starts_with("OK ") && rest == "no waiting", "{heard:?}");

    let start = Instant::now();
    std::thread::scope(|scope| {
        for seed in 0..100 {
            let path = &path;
            scope.spawn(move || {
                let stream = connect(path, 5000).expect("the guest listens");
                echo(stream, seed, if seed == 0 { 64 << 20 } else { 2 << 20 });
            });
        }
    });
    println!("64 MiB and 99 times 2 MiB, each way: {:?}", start.elapsed());
    assert_eq!(daemon.sh(&fork, "echo alive"), "alive");
}

/// Interrupts of the guest's virtio devices, all in all.
fn interrupts(client: &Client, fork: &str) -> u64 {
    let text = client.sh(fork, "grep virtio /proc/interrupts");
    let count = |line: &str| line.split_whitespace().nth(1).and_then(|count| count.parse::<u64>().ok());
    text.lines().filter_map(count).sum()
}

#[test]
fn a_byte_goes_to_and_fro() {
    const ROUNDS: usize = 200;
    let daemon = guest::daemon();
    let fork = daemon.fork(guest::ONE).id;
    let path = open(&daemon, &fork);
    start_echo(&daemon, &fork, &path);
    let mut stream = connect(&path, 5000).unwrap();
    let mut round = || {
        let (start, mut byte) = (Instant::now(), [0]);
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
        start.elapsed()
    };
    for _ in 0..20 {
        round();
    }
    let quiet = interrupts(&daemon, &fork);
    let around = interrupts(&daemon, &fork) - quiet;
    let mut rounds: Vec<_> = (0..ROUNDS).map(|_| round()).collect();
    let taken = interrupts(&daemon, &fork) - quiet - 2 * around;
    rounds.sort();
    println!("1 byte to and fro: p50 {:?}, p99 {:?}", rounds[ROUNDS / 2], rounds[ROUNDS * 99 / 100]);
    println!("interrupts: {:.2} a round, {around} a command", taken as f64 / ROUNDS as f64);
    let mut commands: Vec<_> = (0..40)
        .map(|_| {
            let start = Instant::now();
            daemon.exec(&fork, &json!({"argv": ["/bin/true"]})).unwrap();
            start.elapsed()
        })
        .collect();
    commands.sort();
    println!("/bin/true on a kept connection: p50 {:?}", commands[20]);
}

/// Takes a connection, hears it to its end, and says so. One that is closed sooner may be reset before the guest has said anything.
fn answer_once(listener: &UnixListener, name: &str) {
    let (mut stream, _) = listener.accept().unwrap();
    let mut heard = String::new();
    stream.read_to_string(&mut heard).unwrap();
    write!(stream, "{name} heard {heard}").unwrap();
}

#[test]
fn a_guest_reaches_who_listens_for_it_and_nobody_else() {
    let daemon = guest::daemon();
    let forks = guest::forks(&daemon, guest::ONE, 2);
    let (a, b) = (&forks[0].id, &forks[1].id);
    let refused = "ConnectionResetError";
    assert_eq!(call(&daemon, a, 7000, "hello"), refused, "the host offers nothing");
    let paths = [open(&daemon, a), open(&daemon, b)];
    assert_eq!(call(&daemon, a, 7000, "hello"), refused, "nobody listens");

    let names = paths.clone().map(|path| PathBuf::from(format!("{}_7000", path.display())));
    let listeners = names.clone().map(|name| UnixListener::bind(name).unwrap());
    std::thread::scope(|scope| {
        for (listener, name) in listeners.iter().zip(["A", "B"]) {
            scope.spawn(move || (0..3).for_each(|_| answer_once(listener, name)));
        }
        for (fork, name) in [(a, "A"), (b, "B")] {
            let daemon = &daemon;
            scope.spawn(move || {
                for _ in 0..3 {
                    assert_eq!(call(daemon, fork, 7000, fork), format!("{name} heard {fork}"));
                }
            });
        }
    });

    // What is no socket, or is one by another name only, is not connected to.
    std::fs::write(format!("{}_7001", paths[0].display()), "").unwrap();
    std::os::unix::fs::symlink(&names[1], format!("{}_7002", paths[0].display())).unwrap();
    assert_eq!(call(&daemon, a, 7001, "hello"), refused);
    assert_eq!(call(&daemon, a, 7002, "hello"), refused);

    // A reset fork has lost its connections, and can make new ones.
    start_echo(&daemon, b, &paths[1]);
    let mut held = connect(&paths[1], 5000).unwrap();
    daemon.call::<Value>("POST", &format!("/v1/forks/{b}/reset"), Some(&json!({}))).unwrap();
    assert_eq!(held.read(&mut [0]).unwrap_or(0), 0, "cut");
    assert!(connect(&paths[1], 5000).is_none(), "the server was not in the template");
    std::thread::scope(|scope| {
        scope.spawn(|| answer_once(&listeners[1], "B"));
        assert_eq!(call(&daemon, b, 7000, "again"), "B heard again");
    });
}

#[test]
fn a_fork_out_of_the_pool_offers_nothing_of_its_rehearsal() {
    let daemon: Daemon = guest::daemon();
    daemon.park(guest::ONE, 1);
    let fork = daemon.fork(guest::ONE);
    assert!(fork.parked);
    assert_eq!(call(&daemon, &fork.id, 7000, "hello"), "ConnectionResetError");
    let path = open(&daemon, &fork.id);
    let listener = UnixListener::bind(format!("{}_7000", path.display())).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| answer_once(&listener, "host"));
        assert_eq!(call(&daemon, &fork.id, 7000, "hello"), "host heard hello");
    });
    daemon.set_pool(guest::ONE, &json!({"low": 0, "high": 0}));
}
