use std::{io::BufRead as _, os::unix::net::UnixListener, thread};

use super::*;

/// A connection to a peer that answers the n-th request with the n-th text, in pieces of seven bytes.
fn answered_with(answers: &'static [&'static str]) -> (tempfile::TempDir, Connection) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut requests = std::io::BufReader::new(stream.try_clone().unwrap());
        for answer in answers {
            let mut line = String::new();
            while line != "\r\n" {
                line.clear();
                requests.read_line(&mut line).unwrap();
            }
            for piece in answer.as_bytes().chunks(7) {
                stream.write_all(piece).unwrap();
            }
        }
    });
    let connection = Connection::open(&path).unwrap();
    (directory, connection)
}

#[test]
fn answers_follow_each_other_on_one_connection() {
    let (_directory, mut connection) = answered_with(&[
        "HTTP/1.1 201 Created\r\nContent-Length: 11\r\n\r\n[{\"a\": 1}]\n",
        "HTTP/1.1 204 No Content\r\n\r\n",
        "HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n{}",
    ]);
    assert_eq!(connection.call("GET", "/", None).unwrap(), serde_json::json!([{"a": 1}]));
    assert_eq!(connection.call("GET", "/", None).unwrap(), Value::Null);
    let refused = connection.exchange(&request("GET", "/", None)).unwrap();
    assert_eq!((refused.status, refused.is_success()), (404, false));
}

#[test]
fn chunks_are_joined_and_split_into_lines() {
    let (_directory, mut connection) = answered_with(&[
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\n{\"a\"\r\n5\r\n:1}\n{\r\n3\r\n}\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
    ]);
    let mut lines = Vec::new();
    let each = |line| {
        lines.push(line);
        Ok(())
    };
    connection.lines("GET", "/", None, each).unwrap();
    assert_eq!(lines, [serde_json::json!({"a": 1}), serde_json::json!({})]);
    assert_eq!(connection.call("GET", "/", None).unwrap(), serde_json::json!({}));
}

#[test]
fn what_is_no_answer_is_refused() {
    let (_directory, mut connection) = answered_with(&["SSH-2.0-x\r\n\r\n"]);
    assert!(connection.call("GET", "/", None).is_err());
}
