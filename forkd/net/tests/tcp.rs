//! Connections of guests to servers of the host.

mod guest;

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use forkling_net::control::Limits;
use forkling_proto::network::HOST;
use guest::{Net, host_rule, net_rule, pattern};
use smoltcp::socket::tcp::State;

/// A server on the host's loopback; the address under which guests know it.
fn server(serve: impl Fn(TcpStream) + Send + Clone + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let serve = serve.clone();
            thread::spawn(move || serve(stream.unwrap()));
        }
    });
    (HOST, port).into()
}

fn echo(mut stream: TcpStream) {
    let mut buffer = vec![0; 100_000];
    while let Ok(length) = stream.read(&mut buffer)
        && length > 0
    {
        if stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

#[test]
fn bulk_data_comes_back_as_it_was() {
    let net = Net::start(vec![]);
    let mut guest = net.guest(2, vec![host_rule()]);
    let connection = guest.connect(server(echo));
    let data = pattern(8 << 20);
    let back = guest.echo(connection, &data);
    assert!(back == data);
    let report = net.report(&guest);
    assert!(report.counters.bytes_from_guest > 8 << 20 && report.counters.bytes_to_guest > 8 << 20);
    assert_eq!((report.counters.flows, report.counters.flows_opened, report.counters.denied), (1, 1, 0));
}

#[test]
fn a_byte_waits_for_nothing() {
    let net = Net::start(vec![]);
    let mut guest = net.guest(2, vec![host_rule()]);
    let connection = guest.connect(server(echo));
    let start = std::time::Instant::now();
    for number in 0..1000_u32 {
        let byte = number as u8;
        assert_eq!(guest.echo(connection, &[byte]), [byte]);
    }
    // A wait for a delayed acknowledgement, each time, would be tens of seconds.
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[test]
fn two_hundred_connections_at_once() {
    let net = Net::start(vec![]);
    let mut guest = net.guest(2, vec![host_rule()]);
    let to = server(echo);
    let connections: Vec<_> = (0..200).map(|_| guest.dial(to)).collect();
    for (number, connection) in connections.iter().enumerate() {
        guest.until("a connection", |g| g.tcp(*connection).may_send().then_some(()));
        let data = pattern(1000 + number);
        assert!(guest.echo(*connection, &data) == data);
    }
    assert_eq!(net.report(&guest).counters.flows, 200);
    for connection in connections {
        guest.tcp(connection).close();
    }
    guest.until("the end of all", |_| (net.inspect(2).unwrap().counters.flows == 0).then_some(()));
}

#[test]
fn each_side_ends_for_itself() {
    let net = Net::start(vec![]);
    let mut guest = net.guest(2, vec![host_rule()]);
    let upload = server(|mut stream| {
        let mut data = vec![];
        stream.read_to_end(&mut data).unwrap();
        thread::sleep(Duration::from_millis(50));
        stream.write_all(&data.len().to_be_bytes()).unwrap();
    });
    let connection = guest.connect(upload);
    assert_eq!(guest.tcp(connection).send_slice(&[7; 50_000]), Ok(50_000));
    guest.tcp(connection).close();
    assert_eq!(guest.read_to_end(connection), 50_000_usize.to_be_bytes());

    let download = server(|mut stream| {
        stream.write_all(b"first").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut data = vec![];
        stream.read_to_end(&mut data).unwrap();
        assert_eq!(data, b"after the end");
    });
    let connection = guest.connect(download);
    assert_eq!(guest.read_to_end(connection), b"first");
    assert_eq!(guest.state(connection), State::CloseWait);
    assert_eq!(guest.tcp(connection).send_slice(b"after the end"), Ok(13));
    guest.tcp(connection).close();
    guest.until("the end", |g| (g.state(connection) == State::Closed).then_some(()));
    net.await_report(&guest, |report| report.counters.flows == 0);
}

#[test]
fn resets_pass_both_ways() {
    let net = Net::start(vec![]);
    let mut guest = net.guest(2, vec![host_rule()]);
    let resets = server(|stream| {
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        (&stream).read_exact(&mut [0]).unwrap();
    });
    let connection = guest.connect(resets);
    guest.tcp(connection).send_slice(b"x").unwrap();
    guest.until("a reset", |g| (g.state(connection) == State::Closed).then_some(()));

    let (sender, ended) = std::sync::mpsc::channel();
    let is_reset = server(move |mut stream| {
        let _ = sender.send(stream.read(&mut [0; 9]).map_err(|error| error.kind()));
    });
    let connection = guest.connect(is_reset);
    guest.tcp(connection).abort();
    guest.poll();
    let kind = ended.recv_timeout(guest::PATIENCE).unwrap();
    assert_eq!(kind, Err(std::io::ErrorKind::ConnectionReset));
}

#[test]
fn refused_is_refused_and_denied_is_denied() {
    let net = Net::start(vec![]);
    let mut guest = net.guest(2, vec![host_rule()]);
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    assert!(!guest.connects((HOST, closed)));
    assert_eq!(net.report(&guest).counters.denied, 0);
    let open = server(echo);
    assert!(guest.connects(open));

    let mut other = net.guest(3, vec![net_rule("0.0.0.0/0")]);
    assert!(!other.connects(open));
    assert_eq!(net.denied(&other), [("tcp".into(), None, Some(HOST.into()), Some(open.port()))]);
}

#[test]
fn a_slow_reader_holds_the_writer_back() {
    let net = Net::start(vec![]);
    let mut guest = net.guest(2, vec![host_rule()]);
    let (sender, written) = std::sync::mpsc::channel();
    let flood = server(move |mut stream| {
        stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        let mut sum = 0;
        while let Ok(length) = stream.write(&[1; 65_536]) {
            sum += length;
            if sum > 64 << 20 {
                break;
            }
        }
        sender.send(sum).unwrap();
    });
    guest.connect(flood);
    let sum = guest.until("the writer's end", |_| written.try_recv().ok());
    assert!(sum < 16 << 20, "{sum} bytes were taken though nobody read them");
}

#[test]
fn a_new_policy_resets_what_it_does_not_allow() {
    let net = Net::start(vec![]);
    let mut guest = net.guest(2, vec![host_rule()]);
    let to = server(echo);
    let connection = guest.connect(to);
    net.set_policy(&guest, vec![host_rule(), net_rule("1.0.0.0/8")]);
    assert_eq!(guest.echo(connection, b"still"), b"still");
    net.set_policy(&guest, vec![]);
    guest.until("a reset", |g| (g.state(connection) == State::Closed).then_some(()));
    assert!(!guest.connects(to));
}

#[test]
fn connections_are_limited() {
    let net = Net::start(vec![]);
    let limits = Limits { flows: 3, ..Limits::default() };
    let mut guest = net.guest_with(2, vec![host_rule()], None, limits);
    let to = server(echo);
    for _ in 0..3 {
        guest.connect(to);
    }
    assert!(!guest.connects(to));
    assert_eq!(net.report(&guest).counters.limited, 1);
}

#[test]
fn bytes_are_limited() {
    let net = Net::start(vec![]);
    let limits = Limits { bytes_per_s: 1 << 20, ..Limits::default() };
    let mut guest = net.guest_with(2, vec![host_rule()], None, limits);
    let connection = guest.connect(server(echo));
    let start = std::time::Instant::now();
    let data = pattern(2 << 20);
    assert!(guest.echo(connection, &data) == data);
    // The first second's worth is free.
    assert!(start.elapsed() > Duration::from_millis(800), "{:?}", start.elapsed());
}
