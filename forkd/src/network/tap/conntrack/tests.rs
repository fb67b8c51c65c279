//! Messages, and the answers of this host's kernel.

use super::*;

fn nested(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NESTED, &parts.concat())
}

fn tuple(to: &[u8], kind: u16, protocol: u8, port: Option<u16>) -> Vec<u8> {
    let addresses = nested(TUPLE_IP, &[attribute(kind - 1, to), attribute(kind, to)]);
    let mut flow = vec![attribute(PROTOCOL_NUMBER, &[protocol])];
    flow.extend(port.map(|port| attribute(PORT_DESTINATION, &port.to_be_bytes())));
    nested(TUPLE_ORIGINAL, &[addresses, nested(TUPLE_PROTOCOL, &flow)])
}

#[test]
fn connections_are_read_with_and_without_ports() {
    let tcp = tuple(&[10, 0, 0, 9], V4_DESTINATION, 6, Some(443));
    let found = connection(2, &tcp).expect("a sound tuple");
    assert_eq!((found.to, found.protocol, found.port), ("10.0.0.9".parse().unwrap(), 6, Some(443)));
    assert_eq!(attribute(TUPLE_ORIGINAL | NESTED, &found.tuple), tcp, "named as it was told");
    let v6: std::net::Ipv6Addr = "2001:db8::9".parse().unwrap();
    let echo = connection(10, &tuple(&v6.octets(), V6_DESTINATION, 58, None)).expect("a sound tuple");
    assert_eq!((echo.to, echo.protocol, echo.port), (v6.into(), 58, None));
}

#[test]
fn what_is_cut_off_is_no_connection() {
    let whole = tuple(&[10, 0, 0, 9], V4_DESTINATION, 6, Some(443));
    for len in 0..whole.len() {
        assert_eq!(connection(2, &whole[..len]), None, "{len}");
    }
    assert!(message_of(&[0; 16]).is_none());
    assert!(message_of(&[255; 20]).is_none());
}

#[test]
fn answers_end_with_their_status() {
    assert!(status(&0i32.to_ne_bytes()).is_ok());
    assert_eq!(status(&(-2i32).to_ne_bytes()).unwrap_err().kind(), io::ErrorKind::NotFound);
}
