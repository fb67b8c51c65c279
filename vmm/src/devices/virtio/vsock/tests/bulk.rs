//! Many streams at once, with checksums.

use std::collections::{BTreeMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use super::guest::Guest;
use super::*;

const STREAMS: u32 = 100;
const BYTES: usize = 1 << 20;

/// The guest's end of an echoing stream.
struct Echo {
    request: Header,
    kept: VecDeque<u8>,
    forwarded: u32,
    sent: u32,
    credit: (u32, u32),
}

/// The host's end.
struct Client {
    stream: UnixStream,
    content: Vec<u8>,
    written: usize,
    read: blake3::Hasher,
    count: usize,
}

impl Client {
    fn step(&mut self) {
        if self.written < BYTES {
            match self.stream.write(&self.content[self.written..]) {
                Ok(len) => self.written += len,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
        let mut data = [0; 65536];
        match self.stream.read(&mut data) {
            Ok(len) => {
                assert_ne!(len, 0);
                self.read.update(&data[..len]);
                self.count += len;
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
}

/// Bytes that differ between streams and positions.
fn content(stream: u32) -> Vec<u8> {
    let mut bytes = vec![0; BYTES];
    blake3::Hasher::new().update(&stream.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// The guest takes all packets and echoes what credit allows.
fn echo(guest: &mut Guest, echoes: &mut BTreeMap<u32, Echo>) {
    while let Some((header, data)) = guest.receive() {
        assert_ne!(header.op, op::RST);
        let echo = echoes.get_mut(&header.src_port).unwrap();
        echo.credit = (header.buf_alloc, header.fwd_cnt);
        echo.kept.extend(data);
        assert!(echo.kept.len() <= guest.buffer as usize, "credit overrun");
    }
    for echo in echoes.values_mut() {
        loop {
            let credit = echo.credit.0 - echo.sent.wrapping_sub(echo.credit.1);
            let len = echo.kept.len().min(credit as usize).min(4099);
            if len == 0 {
                break;
            }
            let data: Vec<u8> = echo.kept.drain(..len).collect();
            echo.sent = echo.sent.wrapping_add(len as u32);
            echo.forwarded = echo.forwarded.wrapping_add(len as u32);
            guest.forwarded = echo.forwarded;
            guest.answer(&echo.request, op::RW, 0, &data);
        }
    }
}

#[test]
fn a_hundred_streams_carry_a_mebibyte_each_way() {
    let mut guest = Guest::new();
    guest.buffer = 64 * 1024;
    let mut echoes = BTreeMap::new();
    let mut clients = Vec::new();
    for index in 0..STREAMS {
        let (stream, request) = guest.accept(AGENT + index % 3);
        stream.set_nonblocking(true).unwrap();
        let read = blake3::Hasher::new();
        clients.push(Client { stream, content: content(index), written: 0, read, count: 0 });
        let credit = (request.buf_alloc, request.fwd_cnt);
        echoes
            .insert(request.src_port, Echo { request, kept: VecDeque::new(), forwarded: 0, sent: 0, credit });
    }
    let mut rounds = 0;
    while clients.iter().any(|client| client.count < BYTES) {
        clients.iter_mut().for_each(Client::step);
        guest.host.pump();
        echo(&mut guest, &mut echoes);
        rounds += 1;
        assert!(rounds < 10_000, "streams stand still");
    }
    for client in &clients {
        assert_eq!(client.count, BYTES);
        assert_eq!(client.read.finalize(), blake3::hash(&client.content));
    }
}
