use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

#[test]
fn first_lines() {
    let good: [(&[u8], u32); 5] = [
        (b"CONNECT 52\n", 52),
        (b"connect 0\n", 0),
        (b"Connect 4294967295\n", u32::MAX),
        (b"CONNECT \t 7\r\n", 7),
        (b" CONNECT 7 \n", 7),
    ];
    for (line, port) in good {
        assert_eq!(parse(line), Some(port), "{}", line.escape_ascii());
    }
    let bad: [&[u8]; 10] = [
        b"\n",
        b"CONNECT\n",
        b"CONNECT \n",
        b"CONNECT -1\n",
        b"CONNECT 4294967296\n",
        b"CONNECT 5 6\n",
        b"CONNECT5\n",
        b"HELO 5\n",
        b"CONNECT 5x\n",
        b"CONNECT \xff\n",
    ];
    for line in bad {
        assert_eq!(parse(line), None, "{}", line.escape_ascii());
    }
}

#[tokio::test]
async fn a_line_in_pieces_is_read_and_nothing_behind_it() {
    let (mut client, server) = UnixStream::pair().unwrap();
    let feed = async {
        for piece in ["CON", "NECT ", "10", "24\nbehind"] {
            client.write_all(piece.as_bytes()).await.unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        client
    };
    let (port, client) = tokio::join!(read_port(&server), feed);
    assert_eq!(port.unwrap(), 1024);
    drop(client);
    let (mut server, mut rest) = (server, String::new());
    server.read_to_string(&mut rest).await.unwrap();
    assert_eq!(rest, "behind");
}

#[tokio::test]
async fn lines_without_an_end_are_refused() {
    let (mut client, server) = UnixStream::pair().unwrap();
    client.write_all(&[b'7'; MAX_LINE + 1]).await.unwrap();
    assert!(matches!(read_port(&server).await, Err(GreetError::Line)));
    let (mut client, server) = UnixStream::pair().unwrap();
    client.write_all(b"CONNECT 5").await.unwrap();
    drop(client);
    assert!(matches!(read_port(&server).await, Err(GreetError::Line)));
}

#[test]
fn paths_have_room_for_the_longest_port() {
    let path = |len| PathBuf::from("a".repeat(len));
    assert!(check_length(&path(MAX_SOCKET_PATH - LONGEST_SUFFIX), LONGEST_SUFFIX).is_ok());
    let error = check_length(&path(MAX_SOCKET_PATH - LONGEST_SUFFIX + 1), LONGEST_SUFFIX).unwrap_err();
    assert_eq!(error.code, Code::PathTooLong);
}

#[test]
fn a_living_daemon_keeps_its_sockets() {
    let runtime = tempfile::tempdir().unwrap();
    fs::create_dir_all(runtime.path().join("forks/f-old")).unwrap();
    let first = sweep(runtime.path()).unwrap();
    assert!(!runtime.path().join("forks").exists(), "nobody lived there");
    let directory = Directory::make(runtime.path(), "f-new").unwrap();
    let second = sweep(runtime.path()).unwrap();
    assert!(directory.path().exists());
    let path = directory.path().to_owned();
    drop((directory, first, second));
    assert!(!path.exists());
}
