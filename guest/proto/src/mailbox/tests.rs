use super::*;
use alloc::{string::ToString, vec};

fn sample() -> (Header, Identity) {
    let header = Header {
        generation: 7,
        nonce: 0x1122_3344,
        param: 3,
        wall_clock_ns: 1_700_000_000_000_000_000,
        entropy: [9; 64],
        prepare: true,
    };
    let identity = Identity {
        id: "f-1".to_string(),
        hostname: "worker-1".to_string(),
        machine_id: "0123456789abcdef0123456789abcdef".to_string(),
        env: vec![("A".to_string(), "b".to_string())],
        network: Some(Network { ipv4: core::net::Ipv4Addr::new(100, 64, 1, 2) }),
    };
    (header, identity)
}

#[test]
fn decodes_what_it_encodes() {
    let (header, identity) = sample();
    let bytes = encode(&header, &identity).unwrap();
    assert_eq!(decode(&bytes).unwrap(), (header, identity));
    assert_eq!(filled_len(&bytes), bytes.len());
    assert_eq!(filled_len(&[0xFF; 256]), 256);
}

#[test]
fn encoding_is_pinned() {
    let (header, identity) = sample();
    let bytes = encode(&header, &identity).unwrap();
    assert_eq!(&bytes[..8], b"FORKLING");
    assert_eq!(bytes[offset::GENERATION], 7);
    assert_eq!(&bytes[offset::NONCE..offset::NONCE + 4], &[0x44, 0x33, 0x22, 0x11]);
    assert_eq!(&bytes[offset::PAYLOAD..offset::PAYLOAD + 4], b"\x03f-1");
    assert_eq!(bytes.len(), offset::PAYLOAD + bytes[offset::PAYLOAD_LEN] as usize);
}

#[test]
fn refuses_what_does_not_fit_or_was_not_filled() {
    let (header, mut identity) = sample();
    identity.env = vec![("K".to_string(), "x".repeat(SIZE))];
    assert_eq!(encode(&header, &identity), Err(Error::TooLarge));
    assert_eq!(decode(&[0; 256]), Err(Error::NotFilled));
    let mut bytes = encode(&sample().0, &sample().1).unwrap();
    bytes.truncate(offset::PAYLOAD + 2);
    assert_eq!(decode(&bytes), Err(Error::Malformed));
}
