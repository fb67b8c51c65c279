use super::*;

fn with_port() -> (Ways, u32) {
    let ways = Ways::default();
    let port = Port {
        guest_port: 80,
        at: At::Tcp(([127, 0, 0, 1], 8080).into()),
        connections: PortConnections { total: 3, ..PortConnections::default() },
        task: tokio::spawn(async {}),
    };
    ways.ports().open.insert(7, port);
    (ways, 7)
}

fn counts(ways: &Ways) -> (u64, u64, u64) {
    let PortConnections { open, total, refused } = ways.list()[0].connections;
    (open, total, refused)
}

#[tokio::test]
async fn connections_are_counted_by_what_becomes_of_them() {
    let (ways, group) = with_port();
    for passage in [Passage::Accepted, Passage::Accepted, Passage::Refused, Passage::Ended] {
        ways.passed(group, passage);
    }
    assert_eq!(counts(&ways), (1, 3, 1));
    ways.passed(group + 1, Passage::Accepted);
    assert_eq!(counts(&ways), (1, 3, 1), "news of a port that is gone");
    ways.passed(group, Passage::Ended);
    ways.passed(group, Passage::Ended);
    assert_eq!(counts(&ways), (0, 3, 1), "a fork that lies counts nothing below 0");
}

#[tokio::test]
async fn a_rewound_fork_has_no_open_connections() {
    let (ways, group) = with_port();
    ways.passed(group, Passage::Accepted);
    ways.rewound();
    assert_eq!(counts(&ways), (0, 3, 0));
    assert_eq!(ways.list()[0].host.as_deref(), Some("127.0.0.1:8080"));
}

#[test]
fn what_cannot_be_listened_on_has_its_code() {
    let code = |kind: io::ErrorKind| refused("127.0.0.1:1", kind.into()).code;
    assert_eq!(code(io::ErrorKind::AddrInUse), Code::AddressInUse);
    assert_eq!(code(io::ErrorKind::PermissionDenied), Code::AddressUnavailable);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let error = listen_tcp(taken.local_addr().unwrap()).err().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
}
