use super::*;
use alloc::{string::ToString, vec};

#[test]
fn frame_encoding_is_pinned() {
    let bytes = frame(5, Kind::Ping, b"hi");
    assert_eq!(bytes, [2, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, b'h', b'i']);
}

#[test]
fn exec_encoding_is_pinned() {
    let exec = Exec {
        argv: vec!["ls".to_string()],
        timeout_ms: 300,
        user: Some("a".to_string()),
        ..Exec::default()
    };
    let bytes = postcard::to_allocvec(&exec).unwrap();
    assert_eq!(bytes, [1, 2, b'l', b's', 0, 0, 1, 1, b'a', 0xac, 0x02]);
}

#[test]
fn header_round_trip_and_refusals() {
    let header = Header { len: 9, call: 1, kind: Kind::Exit };
    assert_eq!(Header::decode(&header.encode()), Ok(header));
    let mut bytes = header.encode();
    bytes[8] = 0x7f;
    assert_eq!(Header::decode(&bytes), Err(FrameError::UnknownKind(0x7f)));
    bytes[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(Header::decode(&bytes), Err(FrameError::TooLong(u32::MAX)));
}
