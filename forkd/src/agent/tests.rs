//! Framing against a scripted peer over a real socket pair; behaviour with a real agent is tested end to end.

use std::time::Duration;

use tokio::io::AsyncWriteExt;

use super::*;

struct Peer(UnixStream);

impl Peer {
    async fn read(&mut self) -> (Header, Vec<u8>) {
        let mut bytes = [0; HEADER_LEN];
        self.0.read_exact(&mut bytes).await.unwrap();
        let header = Header::decode(&bytes).unwrap();
        let mut payload = vec![0; header.len as usize];
        self.0.read_exact(&mut payload).await.unwrap();
        (header, payload)
    }

    async fn write(&mut self, call: u32, kind: Kind, payload: &[u8]) {
        self.0.write_all(&rpc::frame(call, kind, payload)).await.unwrap();
    }
}

fn connected() -> (Arc<Connection>, Peer) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Connection::new(ours), Peer(theirs))
}

#[tokio::test]
async fn calls_side_by_side_get_their_own_frames() {
    let (connection, mut peer) = connected();
    let mut first = connection.call(Kind::Exec, b"a").unwrap();
    let mut second = connection.call(Kind::Ping, b"b").unwrap();
    let (a, _) = peer.read().await;
    let (b, _) = peer.read().await;
    peer.write(b.call, Kind::Pong, b"b").await;
    peer.write(a.call, Kind::Started, &[42]).await;
    peer.write(a.call, Kind::Stdout, b"out").await;
    peer.write(a.call, Kind::Exit, &postcard::to_allocvec(&Exit::Status(3)).unwrap()).await;
    assert!(matches!(second.next().await, Ok(Event::Pong)));
    assert!(matches!(first.next().await, Ok(Event::Started(42))));
    assert!(matches!(first.next().await, Ok(Event::Stdout(bytes)) if bytes == b"out"));
    assert!(matches!(first.next().await, Ok(Event::Exit(Exit::Status(3)))));
}

#[tokio::test]
async fn large_input_waits_for_the_reader_and_arrives_whole() {
    let (connection, mut peer) = connected();
    let input: Vec<u8> = (0..2_000_000u32).map(|i| (i % 251) as u8).collect();
    let call = connection.call(Kind::Exec, b"").unwrap();
    let sender = tokio::spawn({
        let input = input.clone();
        async move {
            call.input().stdin(&input).await.unwrap();
            call.input().close().unwrap();
            call
        }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    let _ = peer.read().await;
    let mut received = Vec::new();
    loop {
        let (header, payload) = peer.read().await;
        assert_eq!(header.kind, Kind::Stdin);
        if payload.is_empty() {
            break;
        }
        received.extend(payload);
    }
    assert_eq!(received, input);
    drop(sender.await.unwrap());
}

#[tokio::test]
async fn a_dropped_call_kills_its_command() {
    let (connection, mut peer) = connected();
    let call = connection.call(Kind::Exec, b"").unwrap();
    drop(call);
    let (exec, _) = peer.read().await;
    let (signal, payload) = peer.read().await;
    assert_eq!((signal.kind, signal.call, payload), (Kind::Signal, exec.call, vec![9]));
    // Late frames of it are dropped and hurt no other call.
    peer.write(exec.call, Kind::Stdout, b"late").await;
    let mut ping = connection.call(Kind::Ping, b"").unwrap();
    let (header, _) = peer.read().await;
    peer.write(header.call, Kind::Pong, b"").await;
    assert!(matches!(ping.next().await, Ok(Event::Pong)));
}

#[tokio::test]
async fn hostile_frames_end_the_connection() {
    let (connection, mut peer) = connected();
    let mut call = connection.call(Kind::Ping, b"").unwrap();
    peer.0.write_all(&[0xff; HEADER_LEN]).await.unwrap();
    assert!(matches!(call.next().await, Err(Error::Lost)));
    assert!(!connection.is_open());
    assert!(connection.call(Kind::Ping, b"").is_err());

    let (connection, mut peer) = connected();
    let mut call = connection.call(Kind::Exec, b"").unwrap();
    peer.write(1, Kind::Exit, &[0x77]).await;
    assert!(matches!(call.next().await, Err(Error::Malformed(_))));
    drop(peer);
    let mut call = connection.call(Kind::Ping, b"").unwrap_or(call);
    assert!(call.next().await.is_err());
}

#[tokio::test]
async fn dropping_the_connection_closes_the_stream() {
    let (connection, mut peer) = connected();
    drop(connection);
    let mut byte = [0];
    assert_eq!(peer.0.read(&mut byte).await.unwrap(), 0);
}
