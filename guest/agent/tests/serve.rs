//! The RPC server as a process of its own, over a Unix socket, with real commands.

mod harness;

use std::io::{Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use forkling_proto::rpc::{CallError, Exec, Exit, Kind, MAX_PAYLOAD, frame};

use harness::{Agent, Outcome, argv, is_alive, receive, shell, wait_until};

#[test]
fn output_and_status() {
    let agent = Agent::start();
    let mut host = agent.connect();
    let outcome = host.shell("echo out; echo err >&2; exit 7");
    assert_eq!((outcome.stdout.as_slice(), outcome.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!(outcome.exit, Some(Exit::Status(7)));
    assert_eq!(host.shell("kill -TERM $$").exit, Some(Exit::Signal(15)));
    host.ping();
}

#[test]
fn input_reaches_the_command_and_ends() {
    let agent = Agent::start();
    let mut host = agent.connect();
    let call = host.start(&argv(&["cat"]));
    host.send(call, Kind::Stdin, b"one ");
    host.send(call, Kind::Stdin, b"two");
    host.send(call, Kind::Stdin, b"");
    let outcome = host.finish(call);
    assert_eq!((outcome.text(), outcome.exit), ("one two", Some(Exit::Status(0))));
}

#[test]
fn fifty_mebibytes_through_cat() {
    const TOTAL: usize = 50 << 20;
    let agent = Agent::start();
    let mut host = agent.connect();
    let call = host.start(&argv(&["cat"]));
    let mut writer = host.stream.try_clone().unwrap();
    let pattern: Vec<u8> = (0..MAX_PAYLOAD).map(|at| (at % 251) as u8).collect();
    let sent = pattern.clone();
    let feeder = std::thread::spawn(move || {
        for _ in 0..TOTAL / MAX_PAYLOAD {
            writer.write_all(&frame(call, Kind::Stdin, &sent)).unwrap();
        }
        writer.write_all(&frame(call, Kind::Stdin, &[])).unwrap();
    });
    let outcome = host.finish(call);
    feeder.join().unwrap();
    assert_eq!((outcome.stdout.len(), outcome.exit), (TOTAL, Some(Exit::Status(0))));
    assert!(outcome.stdout.chunks(MAX_PAYLOAD).all(|chunk| chunk == pattern));
}

#[test]
fn a_host_that_does_not_read_costs_no_memory() {
    let agent = Agent::start();
    let mut slow = agent.connect();
    let call = slow.start(&shell("head -c 100000000 /dev/zero"));
    slow.started(call);
    let mut other = agent.connect();
    for _ in 0..20 {
        other.ping();
        assert_eq!(other.shell("echo quick").text(), "quick");
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.process.id())).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib: usize = resident.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(kib < 16 * 1024, "{kib} KiB");
    let outcome = slow.finish(call);
    assert_eq!((outcome.stdout.len(), outcome.exit), (100_000_000, Some(Exit::Status(0))));
}

#[test]
fn a_command_that_does_not_read_stops_only_its_connection() {
    let agent = Agent::start();
    let mut stuck = agent.connect();
    let call = stuck.start(&argv(&["sleep", "1000"]));
    let pid = stuck.started(call).to_string();
    stuck.stream.set_nonblocking(true).unwrap();
    let block = frame(call, Kind::Stdin, &[0; MAX_PAYLOAD]);
    wait_until("back pressure", || stuck.stream.write(&block).is_err());
    agent.connect().ping();
    drop(stuck);
    wait_until("the command's end", || !is_alive(&pid));
}

#[test]
fn unread_input_is_dropped_when_the_command_ends() {
    let agent = Agent::start();
    let mut host = agent.connect();
    let call = host.start(&shell("sleep 0.2; exit 3"));
    let mut writer = host.stream.try_clone().unwrap();
    let feeder = std::thread::spawn(move || {
        for _ in 0..64 {
            writer.write_all(&frame(call, Kind::Stdin, &[0; MAX_PAYLOAD])).unwrap();
        }
    });
    assert_eq!(host.finish(call).exit, Some(Exit::Status(3)));
    feeder.join().unwrap();
    host.ping();
}

#[test]
fn signals_go_to_the_group() {
    let agent = Agent::start();
    let mut host = agent.connect();
    let call =
        host.start(&shell("trap 'echo got it; exit 5' USR1; echo ready; while :; do sleep 0.05; done"));
    host.started(call);
    assert_eq!(host.receive().1, b"ready\n");
    host.send(call, Kind::Signal, &[10]);
    let outcome = host.finish(call);
    assert!(outcome.text().contains("got it"), "{outcome:?}");
    assert_eq!(outcome.exit, Some(Exit::Status(5)));

    let call = host.start(&shell("sleep 1000 & echo $!; wait"));
    host.started(call);
    let grandchild = String::from_utf8(host.receive().1).unwrap();
    host.send(call, Kind::Signal, &[15]);
    assert_eq!(host.finish(call).exit, Some(Exit::Signal(15)));
    wait_until("the grandchild's end", || !is_alive(grandchild.trim()));
    host.send(call, Kind::Signal, &[9]);
    host.ping();
}

#[test]
fn a_timeout_kills_the_whole_group() {
    let agent = Agent::start();
    let mut host = agent.connect();
    let begin = Instant::now();
    let exec = Exec { timeout_ms: 300, ..shell("sleep 1000 & echo $!; sleep 1000") };
    let outcome = host.run(exec);
    assert_eq!(outcome.exit, Some(Exit::TimedOut));
    assert!(begin.elapsed() >= Duration::from_millis(300) && begin.elapsed() < Duration::from_secs(5));
    wait_until("the grandchild's end", || !is_alive(outcome.text()));
    let exec = Exec { timeout_ms: 60_000, ..shell("exit 4") };
    assert_eq!(host.run(exec).exit, Some(Exit::Status(4)));
}

#[test]
fn a_daemon_left_behind_does_not_hold_the_call() {
    let agent = Agent::start();
    let mut host = agent.connect();
    let begin = Instant::now();
    let outcome = host.shell("sleep 1000 & echo $!");
    assert_eq!(outcome.exit, Some(Exit::Status(0)));
    assert!(begin.elapsed() < Duration::from_secs(5));
    assert!(is_alive(outcome.text()), "only timeouts and lost connections kill");
    assert_eq!(host.shell(&format!("kill {}", outcome.text())).exit, Some(Exit::Status(0)));
    // A daemon that never stops writing does not hold it either.
    let outcome = host.shell("yes & echo $! >&2");
    assert_eq!(outcome.exit, Some(Exit::Status(0)));
    let pid = String::from_utf8(outcome.stderr).unwrap();
    wait_until("yes to get SIGPIPE", || !is_alive(pid.trim()));
    wait_until("orphans to be reaped", || agent.children().is_empty());
}

#[test]
fn nothing_is_cut_off_after_a_quick_exit() {
    let agent = Agent::start();
    let mut host = agent.connect();
    // The writer ends at once, with its output still in the pipe and the host late.
    let call = host.start(&shell("head -c 60000 /dev/zero; (sleep 1 &) ; exit 0"));
    std::thread::sleep(Duration::from_millis(400));
    let outcome = host.finish(call);
    assert_eq!((outcome.stdout.len(), outcome.exit), (60_000, Some(Exit::Status(0))));
    wait_until("the orphan to be reaped", || agent.children().is_empty());
}

#[test]
fn a_lost_connection_kills_its_commands_only() {
    let agent = Agent::start();
    let mut keeper = agent.connect();
    let kept = keeper.start(&argv(&["sleep", "1000"]));
    let kept_pid = keeper.started(kept).to_string();
    let mut lost = agent.connect();
    let call = lost.start(&shell("sleep 1000 & echo $!; wait"));
    let leader = lost.started(call).to_string();
    let grandchild = String::from_utf8(lost.receive().1).unwrap();
    drop(lost);
    wait_until("the leader's end", || !is_alive(&leader));
    wait_until("the grandchild's end", || !is_alive(grandchild.trim()));
    assert!(is_alive(&kept_pid));
    keeper.send(kept, Kind::Signal, &[9]);
    assert_eq!(keeper.finish(kept).exit, Some(Exit::Signal(9)));
}

#[test]
fn environment_and_directory() {
    let agent = Agent::start();
    let mut host = agent.connect();
    let directory = agent.path("");
    let exec = Exec {
        cwd: Some(directory.clone()),
        env: vec![("GREETING".into(), "hello there".into()), ("HOME".into(), "/elsewhere".into())],
        ..shell("pwd; echo $GREETING; echo $HOME; echo $USER; env | wc -l")
    };
    let outcome = host.run(exec);
    let expected = format!("{}\nhello there\n/elsewhere\nroot\n", directory.trim_end_matches('/'));
    assert!(outcome.text().starts_with(&expected), "{outcome:?}");
    assert_eq!(host.shell("pwd").text(), "/");
    assert_eq!(host.shell("echo $CARGO").text(), "", "nothing of the agent's own environment");
}

#[test]
fn the_path_of_the_command_counts() {
    let agent = Agent::start();
    let mut host = agent.connect();
    std::fs::write(agent.path("tool"), "#!/bin/sh\necho found $0\n").unwrap();
    let set_mode = |mode| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(agent.path("tool"), std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let exec = Exec { env: vec![("PATH".into(), agent.path(""))], ..argv(&["tool"]) };
    set_mode(0o644);
    assert_eq!(host.run(exec.clone()).error, Some(CallError::NotFound("tool".into())));
    set_mode(0o755);
    assert!(host.run(exec).text().starts_with("found"));
    let exec = Exec { cwd: Some(agent.path("")), ..argv(&["./tool"]) };
    assert_eq!(host.run(exec).exit, Some(Exit::Status(0)));
}

#[test]
fn another_user() {
    if std::process::Command::new("id").arg("-u").output().unwrap().stdout != b"0\n" {
        // Without root only the own user can be taken; the error must say so.
        let agent = Agent::start();
        let outcome = agent.connect().run(Exec { user: Some("root".into()), ..argv(&["id"]) });
        assert!(outcome.error.is_some());
        return;
    }
    let agent = Agent::start();
    let mut host = agent.connect();
    let outcome =
        host.run(Exec { user: Some("nobody".into()), ..shell("id -u; id -G; echo $HOME $USER; pwd") });
    let lines: Vec<&str> = outcome.text().lines().collect();
    assert_eq!((lines[0], lines[1], lines[3]), ("65534", "65534", "/"));
    assert!(lines[2].ends_with(" nobody"), "{lines:?}");
    let outcome = host.run(Exec { user: Some("12345".into()), ..shell("id -u; id -g") });
    assert_eq!(outcome.text(), "12345\n12345");
}

#[test]
fn errors_say_what_is_wrong() {
    let agent = Agent::start();
    let mut host = agent.connect();
    let mut refused = |exec: Exec| host.run(exec).error.unwrap();
    assert_eq!(refused(argv(&["no-such-program"])), CallError::NotFound("no-such-program".into()));
    assert_eq!(refused(argv(&["/etc/passwd"])), CallError::NotFound("/etc/passwd".into()));
    assert_eq!(refused(argv(&["/"])), CallError::NotFound("/".into()));
    let nowhere = Exec { cwd: Some("/no/such/place".into()), ..argv(&["true"]) };
    assert_eq!(refused(nowhere), CallError::NoSuchDirectory("/no/such/place".into()));
    let nobody = Exec { user: Some("no-such-user".into()), ..argv(&["true"]) };
    assert_eq!(refused(nobody), CallError::NoSuchUser("no-such-user".into()));
    assert!(matches!(refused(argv(&[])), CallError::BadRequest(_)));
    assert!(matches!(refused(argv(&[""])), CallError::BadRequest(_)));
    assert!(matches!(refused(argv(&["echo", "a\0b"])), CallError::BadRequest(_)));
    let bad_name = Exec { env: vec![("A=B".into(), "c".into())], ..argv(&["true"]) };
    assert!(matches!(refused(bad_name), CallError::BadRequest(_)));
    host.send(90, Kind::Exec, b"\xff\xff\xff");
    assert!(matches!(host.finish(90).error, Some(CallError::BadRequest(_))));
    host.send(91, Kind::Pong, b"");
    assert!(matches!(host.finish(91).error, Some(CallError::BadRequest(_))));
    host.send(92, Kind::Freeze, b"");
    assert!(matches!(host.finish(92).error, Some(CallError::System(_))), "not a guest");
    let call = host.start(&argv(&["sleep", "1000"]));
    host.started(call);
    host.send(call, Kind::Signal, &[200]);
    assert!(matches!(host.finish(call).error, Some(CallError::BadRequest(_))));
    host.ping();
}

#[test]
fn what_is_no_frame_ends_the_connection() {
    let agent = Agent::start();
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 64], &[0, 0, 0, 0, 1, 0, 0, 0, 77, 0, 0, 0]] {
        let mut host = agent.connect();
        host.stream.write_all(garbage).unwrap();
        assert_eq!(host.stream.read(&mut [0; 16]).unwrap_or(0), 0);
    }
    // A number that is in use.
    let mut host = agent.connect();
    let call = host.start(&argv(&["sleep", "1000"]));
    let pid = host.started(call).to_string();
    host.send(call, Kind::Ping, b"");
    assert!(receive(&mut host.stream).is_err());
    wait_until("the command's end", || !is_alive(&pid));
    agent.connect().ping();
}

#[test]
fn frames_may_arrive_in_pieces() {
    let agent = Agent::start();
    let mut host = agent.connect();
    let bytes = [frame(1, Kind::Exec, &postcard::to_allocvec(&argv(&["cat"])).unwrap()), {
        let mut input = frame(1, Kind::Stdin, b"in pieces");
        input.extend(frame(1, Kind::Stdin, b""));
        input
    }]
    .concat();
    for byte in bytes {
        host.stream.write_all(&[byte]).unwrap();
    }
    assert_eq!(host.finish(1).text(), "in pieces");
}

#[test]
fn many_calls_side_by_side() {
    let agent = Agent::start();
    let before = agent.descriptors();
    let hosts: Vec<_> = (0..4)
        .map(|_| {
            let mut host = agent.connect();
            std::thread::spawn(move || {
                let calls: Vec<u32> = (0..25)
                    .map(|at| host.start(&shell(&format!("sleep 0.1; echo {at}; exit {at}"))))
                    .collect();
                let mut outcomes: Vec<Outcome> = calls.iter().map(|_| Outcome::default()).collect();
                let mut running = calls.len();
                while running > 0 {
                    let (header, payload) = host.receive();
                    let at = (header.call - calls[0]) as usize;
                    running -= usize::from(outcomes[at].take(header.kind, &payload));
                }
                for (at, outcome) in outcomes.iter().enumerate() {
                    assert_eq!(outcome.text(), at.to_string());
                    assert_eq!(outcome.exit, Some(Exit::Status(at as i32)));
                }
            })
        })
        .collect();
    hosts.into_iter().for_each(|host| host.join().unwrap());
    wait_until("descriptors to be closed", || agent.descriptors() <= before);
    assert!(agent.children().is_empty());
    assert!(Path::new(&agent.path("agent.sock")).exists());
}
