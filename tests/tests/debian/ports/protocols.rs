//! What is built on streams, with clients that know nothing of guests.

use std::{
    io::{Cursor, Read, Write},
    net::TcpStream,
    os::unix::net::UnixStream,
};

use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tungstenite::Message;

use super::{forward, in_background, tunnel};
use crate::guest;

const SERVERS: &str = include_str!("protocols.py");

/// Three requests at once on one connection, each with a body that comes back.
async fn http2(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
    const BODY: usize = 20_000;
    let (mut client, connection) =
        h2::client::Builder::new().handshake::<_, Cursor<Vec<u8>>>(stream).await.unwrap();
    tokio::spawn(connection);
    let mut answers = Vec::new();
    for number in 0..3 {
        client = client.ready().await.unwrap();
        let request = http::Request::post("http://guest/").body(()).unwrap();
        let (answer, mut body) = client.send_request(request, false).unwrap();
        body.send_data(Cursor::new(vec![number; BODY]), true).unwrap();
        answers.push((number, answer));
    }
    for (number, answer) in answers {
        let answer = answer.await.unwrap();
        assert_eq!(answer.status(), 200);
        let (mut body, mut data) = (answer.into_body(), Vec::new());
        while let Some(piece) = body.data().await {
            let piece = piece.unwrap();
            body.flow_control().release_capacity(piece.len()).unwrap();
            data.extend_from_slice(&piece);
        }
        assert!(data == vec![number; BODY], "{number}: {} bytes", data.len());
    }
}

/// The handshake, messages of three sizes, a ping, and the closing.
fn websocket(stream: impl Read + Write) {
    let Ok((mut socket, _)) = tungstenite::client("ws://guest/", stream) else { panic!("no handshake") };
    let messages =
        [Message::text("hello"), Message::binary(vec![7; 300]), Message::binary(vec![0xa5; 100_001])];
    for message in messages {
        socket.send(message.clone()).unwrap();
        assert_eq!(socket.read().unwrap(), message);
    }
    socket.send(Message::Ping(vec![1, 2, 3].into())).unwrap();
    assert_eq!(socket.read().unwrap(), Message::Pong(vec![1, 2, 3].into()));
    socket.close(None).unwrap();
    while let Ok(message) = socket.read() {
        assert!(message.is_close(), "{message:?}");
    }
}

#[test]
fn http2_and_websockets_pass() {
    let daemon = guest::daemon();
    let fork = daemon.fork(guest::ONE).id;
    in_background(&daemon, &fork, SERVERS);
    let wait = "import socket, time
for port in (8002, 8003):
    while socket.socket().connect_ex(('127.0.0.1', port)): time.sleep(0.2)";
    daemon.sh(&fork, &format!("python3 -c \"{wait}\""));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();

    let port = forward(&daemon, &fork, &json!({"guest_port": 8002}));
    runtime.block_on(async {
        http2(tokio::net::TcpStream::connect(port.host.as_deref().unwrap()).await.unwrap()).await;
    });
    let port = forward(&daemon, &fork, &json!({"guest_port": 8002, "unix": "http2"}));
    runtime.block_on(async {
        http2(tokio::net::UnixStream::connect(port.unix.as_deref().unwrap()).await.unwrap()).await;
    });
    let (stream, _) = tunnel(&daemon, &fork, 8002);
    stream.set_nonblocking(true).unwrap();
    runtime.block_on(async { http2(tokio::net::UnixStream::from_std(stream).unwrap()).await });

    let port = forward(&daemon, &fork, &json!({"guest_port": 8003}));
    websocket(TcpStream::connect(port.host.as_deref().unwrap()).unwrap());
    let port = forward(&daemon, &fork, &json!({"guest_port": 8003, "unix": "websocket"}));
    websocket(UnixStream::connect(port.unix.as_deref().unwrap()).unwrap());
    websocket(tunnel(&daemon, &fork, 8003).0);
}
