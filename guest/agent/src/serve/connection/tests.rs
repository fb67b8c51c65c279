use super::*;
use forkling_proto::rpc::frame;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

fn pair() -> (Connection, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    (Connection::new(near.into()), far)
}

#[test]
fn frames_are_put_together_from_pieces() {
    let (mut connection, mut host) = pair();
    let bytes = [frame(1, Kind::Ping, b"abc"), frame(2, Kind::Stdin, b"")].concat();
    for piece in bytes.chunks(7) {
        assert_eq!(connection.fill().unwrap(), Fill::Nothing);
        host.write_all(piece).unwrap();
        assert_eq!(connection.fill().unwrap(), Fill::Some);
    }
    let (header, payload) = connection.next_frame().unwrap().unwrap();
    assert_eq!((header.call, header.kind, payload.as_slice()), (1, Kind::Ping, &b"abc"[..]));
    let (header, payload) = connection.next_frame().unwrap().unwrap();
    assert_eq!((header.call, header.kind, payload.len()), (2, Kind::Stdin, 0));
    assert!(connection.next_frame().unwrap().is_none());
    drop(host);
    assert_eq!(connection.fill().unwrap(), Fill::End);
}

#[test]
fn the_longest_frame_fits_and_a_longer_one_is_an_error() {
    let (mut connection, mut host) = pair();
    let longest = frame(1, Kind::Stdin, &vec![5; MAX_PAYLOAD]);
    let writer = std::thread::spawn(move || {
        host.write_all(&longest).unwrap();
        host.write_all(&(MAX_PAYLOAD as u32 + 1).to_le_bytes()).unwrap();
        host.write_all(&[0; 4]).unwrap();
        host.write_all(&[Kind::Stdin as u8, 0, 0, 0]).unwrap();
        host
    });
    let (_, payload) = loop {
        connection.fill().unwrap();
        if let Some(frame) = connection.next_frame().unwrap() {
            break frame;
        }
    };
    assert_eq!(payload, vec![5; MAX_PAYLOAD]);
    let _host = writer.join().unwrap();
    connection.fill().unwrap();
    assert_eq!(connection.next_frame().unwrap_err(), FrameError::TooLong(MAX_PAYLOAD as u32 + 1));
}

#[test]
fn output_waits_for_the_host_and_is_not_lost() {
    let (mut connection, mut host) = pair();
    let mut sent = 0_usize;
    while !connection.is_congested() {
        connection.send(7, Kind::Stdout, &[sent as u8; 10_000]);
        connection.flush().unwrap();
        sent += 1;
    }
    assert!(connection.wanted().contains(EventFlags::OUT));
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        host.read_to_end(&mut all).unwrap();
        all
    });
    while connection.unsent() > 0 {
        connection.flush().unwrap();
    }
    assert!(!connection.wanted().contains(EventFlags::OUT));
    drop(connection);
    let all = reader.join().unwrap();
    assert_eq!(all.len(), sent * (HEADER_LEN + 10_000));
    for (at, bytes) in all.chunks(HEADER_LEN + 10_000).enumerate() {
        assert_eq!(bytes[..HEADER_LEN], frame(7, Kind::Stdout, &[0; 10_000])[..HEADER_LEN]);
        assert!(bytes[HEADER_LEN..].iter().all(|byte| *byte == at as u8));
    }
}
