//! Streams through the agent to TCP ports of the loopback, over a Unix socket instead of vsock.

#[allow(dead_code, reason = "other test binaries use the rest")]
mod harness;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use forkling_proto::forward::Verdict;

use harness::{Agent, wait_until};

fn verdict(stream: &mut UnixStream) -> Verdict {
    let mut byte = [0];
    stream.read_exact(&mut byte).unwrap();
    Verdict::try_from(byte[0]).unwrap()
}

/// A server's end and the host's end of a stream through the agent.
fn joined(agent: &Agent) -> (TcpStream, UnixStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut host = agent.forward(listener.local_addr().unwrap().port());
    let (server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    assert_eq!(verdict(&mut host), Verdict::Connected);
    (server, host)
}

/// A port nobody listens on.
fn closed_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|at| ((at * 7 + seed) % 251) as u8).collect()
}

fn cpu_ticks(agent: &Agent) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", agent.process.id())).unwrap();
    let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn bytes_pass_both_ways_and_each_direction_ends_by_itself() {
    let agent = Agent::start();
    let (mut server, mut host) = joined(&agent);
    host.write_all(b"question").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    let mut heard = Vec::new();
    server.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, b"question");
    server.write_all(b"answer after the end of the question").unwrap();
    drop(server);
    let mut heard = Vec::new();
    host.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, b"answer after the end of the question");
}

#[test]
fn a_server_that_ends_first_still_hears_the_rest() {
    let agent = Agent::start();
    let (mut server, mut host) = joined(&agent);
    server.write_all(b"all I have").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    let mut heard = Vec::new();
    host.read_to_end(&mut heard).unwrap();
    assert_eq!(heard, b"all I have");
    host.write_all(&pattern(1 << 20, 3)).unwrap_or_default();
    drop(host);
    let mut heard = Vec::new();
    server.read_to_end(&mut heard).unwrap();
    assert!(heard == pattern(1 << 20, 3));
}

#[test]
fn data_behind_the_header_is_not_lost() {
    let agent = Agent::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut host = agent.forward(listener.local_addr().unwrap().port());
    host.write_all(b"early").unwrap();
    let (mut server, _) = listener.accept().unwrap();
    let mut heard = [0; 5];
    server.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"early");
    assert_eq!(verdict(&mut host), Verdict::Connected);
}

#[test]
fn a_header_in_two_pieces_is_one() {
    let agent = Agent::start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let header = forkling_proto::forward::header(listener.local_addr().unwrap().port());
    let mut host = UnixStream::connect(agent.path(harness::FORWARD)).unwrap();
    host.write_all(&header[..1]).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    host.write_all(&header[1..]).unwrap();
    assert_eq!(verdict(&mut host), Verdict::Connected);
}

#[test]
fn a_closed_port_is_told_and_the_stream_closed() {
    let agent = Agent::start();
    for port in [closed_port(), 0] {
        let mut host = agent.forward(port);
        assert_eq!(verdict(&mut host), Verdict::Closed);
        assert_eq!(host.read(&mut [0]).unwrap(), 0);
    }
    agent.connect().ping();
}

#[test]
fn a_server_that_listens_on_ipv6_only_is_found() {
    let agent = Agent::start();
    let listener = match TcpListener::bind("[::1]:0") {
        Ok(listener) => listener,
        // This host has no IPv6: then nobody can be there, and that is what has to be said.
        Err(_) => return assert_eq!(verdict(&mut agent.forward(closed_port())), Verdict::Closed),
    };
    let mut host = agent.forward(listener.local_addr().unwrap().port());
    assert_eq!(verdict(&mut host), Verdict::Connected);
    let (mut server, _) = listener.accept().unwrap();
    server.write_all(b"six").unwrap();
    let mut heard = [0; 3];
    host.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"six");
}

#[test]
fn a_hundred_streams_at_once_and_one_that_stands_still() {
    const LEN: usize = 512 << 10;
    let agent = Agent::start();
    // It never reads: the agent must neither wait for it nor buffer without bound.
    let (_stuck_server, mut stuck) = joined(&agent);
    stuck.set_nonblocking(true).unwrap();
    let chunk = pattern(64 << 10, 0);
    let full = loop {
        match stuck.write(&chunk) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break true,
            Err(error) => panic!("{error}"),
        }
    };
    assert!(full);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..100 {
                let (mut server, _) = listener.accept().unwrap();
                let mut reader = server.try_clone().unwrap();
                std::thread::spawn(move || std::io::copy(&mut reader, &mut server));
            }
        });
        for seed in 0..100 {
            let agent = &agent;
            scope.spawn(move || {
                let mut host = agent.forward(port);
                assert_eq!(verdict(&mut host), Verdict::Connected);
                let mut writer = host.try_clone().unwrap();
                let sent = pattern(LEN, seed);
                let copy = sent.clone();
                let feeder = std::thread::spawn(move || writer.write_all(&copy).unwrap());
                let mut heard = vec![0; LEN];
                host.read_exact(&mut heard).unwrap();
                feeder.join().unwrap();
                assert!(heard == sent, "stream {seed}");
            });
        }
    });
    println!("100 echoes of {LEN} bytes took {:?}", start.elapsed());
    agent.connect().ping();
}

#[test]
fn ended_streams_leave_nothing_and_idle_ones_cost_no_time() {
    let agent = Agent::start();
    let before = agent.descriptors();
    for _ in 0..50 {
        let (server, host) = joined(&agent);
        drop((server, host));
    }
    wait_until("all descriptors to be closed", || agent.descriptors() <= before);
    // Half closed in every way, and a client that is gone while its server does not read.
    let (server, host) = joined(&agent);
    server.shutdown(Shutdown::Write).unwrap();
    let (other_server, other_host) = joined(&agent);
    other_host.shutdown(Shutdown::Write).unwrap();
    let (_deaf_server, mut gone) = joined(&agent);
    gone.set_nonblocking(true).unwrap();
    while gone.write(&[1; 65_536]).is_ok() {}
    drop(gone);
    std::thread::sleep(Duration::from_millis(200));
    let ticks = cpu_ticks(&agent);
    std::thread::sleep(Duration::from_secs(1));
    assert!(cpu_ticks(&agent) - ticks <= 5, "the agent spins");
    drop((server, host, other_server, other_host));
}

#[test]
fn a_gibibyte_passes_in_reasonable_time() {
    const LEN: usize = 1 << 30;
    let agent = Agent::start();
    let (mut server, mut host) = joined(&agent);
    let start = Instant::now();
    let reader = std::thread::spawn(move || {
        let mut buffer = vec![0; 256 << 10];
        let mut total = 0;
        while let Ok(count @ 1..) = server.read(&mut buffer) {
            total += count;
        }
        total
    });
    let chunk = pattern(256 << 10, 1);
    for _ in 0..LEN / chunk.len() {
        host.write_all(&chunk).unwrap();
    }
    drop(host);
    assert_eq!(reader.join().unwrap(), LEN);
    println!("1 GiB through the agent took {:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(60));
}
