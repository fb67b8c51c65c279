use super::*;
use std::net::TcpListener;

#[test]
fn a_port_is_ready_while_somebody_listens() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    assert!(accepts(port));
    drop(listener);
    assert!(!accepts(port));
}
