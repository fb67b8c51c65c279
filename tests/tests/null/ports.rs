//! Sockets and ports of forks: what can be refused is refused before anything is made, and nothing outlives its fork.

use std::{
    io::{Read, Write},
    os::unix::{
        fs::{FileTypeExt, MetadataExt},
        net::UnixStream,
    },
    path::PathBuf,
    time::Duration,
};

use forkling_daemon::api::types::{ErrorBody, Ports, VsockInfo};
use forkling_tests::{
    daemon::{Daemon, Settings},
    eventually,
};
use serde_json::{Value, json};

fn open_vsock(daemon: &Daemon, fork: &str) -> PathBuf {
    let opened: VsockInfo = daemon.call("POST", &format!("/v1/forks/{fork}/vsock"), None).unwrap();
    opened.path.into()
}

fn forward(daemon: &Daemon, fork: &str, request: &Value) -> ErrorBody {
    daemon.call::<Value>("POST", &format!("/v1/forks/{fork}/ports"), Some(request)).unwrap_err()
}

/// What a client reads that says `words`.
fn answer_to(path: &PathBuf, words: &[u8]) -> Vec<u8> {
    let mut client = UnixStream::connect(path).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    client.write_all(words).unwrap();
    let mut answer = Vec::new();
    // A daemon that closes with bytes unread resets the connection.
    let _ = client.read_to_end(&mut answer);
    answer
}

#[test]
fn a_vsock_socket_is_made_once_and_goes_with_its_fork() {
    let daemon = Daemon::with_null();
    let fork = daemon.fork("null").id;
    let path = format!("/v1/forks/{fork}/vsock");
    let error = daemon.call::<Value>("GET", &path, None).unwrap_err();
    assert_eq!(error.code, "vsock_not_open");
    assert!(!daemon.settings.path().join("run/forks").exists(), "nothing is made unasked");

    let socket = open_vsock(&daemon, &fork);
    assert_eq!(open_vsock(&daemon, &fork), socket, "asked for again");
    assert_eq!(daemon.call::<VsockInfo>("GET", &path, None).unwrap().path, socket.to_str().unwrap());
    let metadata = std::fs::symlink_metadata(&socket).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.mode() & 0o777, 0o660);
    let directory = socket.parent().unwrap().to_owned();
    assert_eq!(directory.metadata().unwrap().mode() & 0o777, 0o770);
    assert_eq!(directory.parent().unwrap().metadata().unwrap().mode() & 0o777, 0o750);

    // The null guest drives no vsock, and the rest is not the convention.
    for words in [&b"CONNECT 1024\n"[..], b"CONNECT x\n", b"GET / HTTP/1.1\r\n\r\n", &[b'A'; 4096]] {
        assert_eq!(answer_to(&socket, words), b"", "{}", words.escape_ascii());
    }
    let reset: Value = json!({});
    daemon.call::<Value>("POST", &format!("/v1/forks/{fork}/reset"), Some(&reset)).unwrap();
    assert_eq!(answer_to(&socket, b"CONNECT 1024\n"), b"");
    assert_eq!(open_vsock(&daemon, &fork), socket, "a reset fork keeps it");

    let sibling = open_vsock(&daemon, &daemon.fork("null").id);
    assert_ne!(sibling, socket);
    daemon.kill(&fork).unwrap();
    eventually(Duration::from_secs(5), "the fork's directory is removed", || {
        if directory.exists() { Err(directory.display().to_string()) } else { Ok(()) }
    });
    assert_eq!(daemon.call::<Value>("POST", &path, None).unwrap_err().code, "fork_died");
    assert!(sibling.exists());
    let (_, settings) = daemon.stop();
    assert!(!sibling.exists(), "sockets go with the daemon");
    drop(settings);
}

#[test]
fn connections_while_a_fork_is_reset_wait() {
    let daemon = Daemon::with_null();
    let fork = daemon.fork("null").id;
    let socket = open_vsock(&daemon, &fork);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..50).for_each(|_| assert_eq!(answer_to(&socket, b"CONNECT 9\n"), b"")));
        }
        for _ in 0..20 {
            daemon.call::<Value>("POST", &format!("/v1/forks/{fork}/reset"), Some(&json!({}))).unwrap();
        }
    });
    assert!(daemon.inspect(&fork).unwrap().death.is_none());
}

#[test]
fn what_a_killed_daemon_left_is_removed_at_the_next_start() {
    let daemon = Daemon::with_null();
    let socket = open_vsock(&daemon, &daemon.fork("null").id);
    let (_, settings) = daemon.crash();
    assert!(socket.exists());
    let daemon = settings.start();
    assert!(!socket.parent().unwrap().exists());
    open_vsock(&daemon, &daemon.fork("null").id);
}

#[test]
fn a_runtime_directory_without_room_for_sockets_is_told() {
    let settings = Settings::default();
    let long = settings.path().join("long".repeat(14));
    std::fs::create_dir(&long).unwrap();
    std::fs::copy(settings.null_guest(), long.join("null.bin")).unwrap();
    let daemon = Settings::shared(&long).start();
    daemon.build_null("null");
    let fork = daemon.fork("null").id;
    let error = daemon.call::<Value>("POST", &format!("/v1/forks/{fork}/vsock"), None).unwrap_err();
    assert_eq!(error.code, "path_too_long", "{error:?}");
    eventually(Duration::from_secs(5), "no directory is left", || {
        let left = std::fs::read_dir(long.join("run/forks")).unwrap().count();
        if left == 0 { Ok(()) } else { Err(format!("{left} are")) }
    });
    drop(daemon);
    drop(settings);
}

#[test]
fn ports_and_tunnels_that_cannot_be() {
    let daemon = Daemon::with_null();
    let fork = daemon.fork("null").id;
    let refusals = [
        (json!({"guest_port": 0}), "invalid_port"),
        (json!({"guest_port": 65536}), "invalid_port"),
        (json!({"guest_port": "80"}), "invalid_request"),
        (json!({}), "invalid_request"),
        (json!({"guest_port": 80, "colour": "red"}), "invalid_request"),
        (json!({"guest_port": 80, "host": "127.0.0.1:0", "unix": "a"}), "invalid_request"),
        (json!({"guest_port": 80, "host": "localhost"}), "invalid_request"),
        (json!({"guest_port": 80, "host": "127.0.0.1:65536"}), "invalid_request"),
        (json!({"guest_port": 80, "host": "0.0.0.0:0"}), "address_not_loopback"),
        (json!({"guest_port": 80, "host": "10.0.0.1:8080"}), "address_not_loopback"),
        (json!({"guest_port": 80, "host": "[::]:0"}), "address_not_loopback"),
        (json!({"guest_port": 80, "unix": "../x"}), "invalid_name"),
        (json!({"guest_port": 80, "unix": "/tmp/x"}), "invalid_name"),
        (json!({"guest_port": 80, "unix": ""}), "invalid_name"),
        (json!({"guest_port": 80, "unix": "vsock.sock"}), "invalid_name"),
        (json!({"guest_port": 80, "unix": "vsock.sock_52"}), "invalid_name"),
        (json!({"guest_port": 80}), "no_agent"),
    ];
    for (request, code) in refusals {
        let error = forward(&daemon, &fork, &request);
        assert_eq!(error.code, code, "{request}: {error:?}");
        assert!(!error.message.is_empty() && error.remediation.len() > 10, "{request}: {error:?}");
    }
    assert_eq!(forward(&daemon, "nobody", &json!({"guest_port": 80})).code, "fork_not_found");
    let ports: Ports = daemon.call("GET", &format!("/v1/forks/{fork}/ports"), None).unwrap();
    assert!(ports.ports.is_empty());
    let delete = |port: &str| {
        daemon.call::<Value>("DELETE", &format!("/v1/forks/{fork}/ports/{port}"), None).unwrap_err().code
    };
    assert_eq!((delete("1").as_str(), delete("x").as_str()), ("port_not_found", "port_not_found"));
    assert_eq!(delete("..%2F1"), "invalid_name");
    assert!(!daemon.settings.path().join("run/forks").exists(), "a refusal leaves nothing");

    let upgrade = [("connection", "Upgrade"), ("upgrade", "forkling-tunnel")];
    let tunnel = |fork: &str, query: &str, headers: &[(&str, &str)]| {
        let path = format!("/v1/forks/{fork}/tunnel{query}");
        let reply = daemon.raw("GET", &path, headers, None);
        let answer: Value = serde_json::from_slice(&reply.body).unwrap();
        (reply.status, answer["error"]["code"].as_str().unwrap().to_owned())
    };
    let refused = |status, code: &str| (status, code.to_owned());
    assert_eq!(tunnel(&fork, "?port=80", &[]), refused(426, "upgrade_required"));
    assert_eq!(tunnel(&fork, "?port=80", &[("upgrade", "websocket"), upgrade[0]]).0, 426);
    assert_eq!(tunnel(&fork, "?port=0", &upgrade), refused(400, "invalid_port"));
    assert_eq!(tunnel(&fork, "?port=x", &upgrade), refused(400, "invalid_request"));
    assert_eq!(tunnel(&fork, "", &upgrade), refused(400, "invalid_request"));
    assert_eq!(tunnel(&fork, "?port=80", &upgrade), refused(409, "no_agent"));
    assert_eq!(tunnel("nobody", "?port=80", &upgrade), refused(404, "fork_not_found"));
}
