//! Commands in forks: output, status, signals, time limits, users, directories, environment, input.

use std::time::Instant;

use forkling_daemon::api::types::{ExecAnswer, ExecEnd, ExecEvent};
use forkling_tests::daemon::Daemon;
use serde_json::{Value, json};

use crate::guest;

fn exec(daemon: &Daemon, request: Value) -> ExecAnswer {
    daemon.exec("one", &request).unwrap_or_else(|error| panic!("{request}: {error:?}"))
}

fn code(daemon: &Daemon, request: Value) -> String {
    let error = daemon.exec("one", &request).expect_err("the request cannot be done");
    assert!(!error.message.is_empty() && !error.remediation.is_empty(), "{error:?}");
    error.code
}

fn exited(code: i32) -> ExecEnd {
    ExecEnd { exit_code: Some(code), signal: None, timed_out: false }
}

fn fork_named_one() -> Daemon {
    let daemon = guest::daemon();
    daemon.forks_with(&json!({"template": guest::ONE, "names": ["one"]}));
    daemon
}

#[test]
fn output_status_and_signals() {
    let daemon = fork_named_one();
    let answer = exec(&daemon, json!({"argv": ["sh", "-c", "echo out; echo err >&2; exit 7"]}));
    assert_eq!((answer.stdout.as_str(), answer.stderr.as_str()), ("out\n", "err\n"));
    assert_eq!(answer.end, exited(7));
    assert!(answer.timings_us.total > 0.0);
    let answer = exec(&daemon, json!({"argv": ["sh", "-c", "kill -9 $$"]}));
    assert_eq!(answer.end, ExecEnd { exit_code: None, signal: Some(9), timed_out: false });
    let answer = exec(&daemon, json!({"argv": ["/bin/echo", "a b", "", "ü"]}));
    assert_eq!(answer.stdout, "a b  ü\n", "arguments pass as they are");
    let answer = exec(&daemon, json!({"argv": ["printf", "\\377\\000x"]}));
    assert_eq!(answer.stdout_base64.as_deref(), Some("/wB4"), "{answer:?}");
    let answer = exec(&daemon, json!({"argv": ["head", "-c", "3000000", "/dev/zero"]}));
    assert_eq!((answer.stdout.len(), answer.stdout_truncated), (3_000_000, false));
}

#[test]
fn time_limits_and_what_cannot_be_run() {
    let daemon = fork_named_one();
    let start = Instant::now();
    let request = json!({"argv": ["sh", "-c", "echo begun; sleep 1000 & sleep 1000"], "timeout_ms": 700});
    let answer = exec(&daemon, request);
    assert_eq!(answer.end, ExecEnd { exit_code: None, signal: None, timed_out: true });
    assert_eq!(answer.stdout, "begun\n");
    assert!(start.elapsed().as_secs_f64() < 30.0);
    assert_eq!(daemon.sh("one", "pgrep -c sleep || true"), "0", "the whole process group was killed");
    assert_eq!(code(&daemon, json!({"argv": ["no-such-command"]})), "command_not_found");
    assert_eq!(code(&daemon, json!({"argv": ["/etc/passwd"]})), "command_not_found");
    assert_eq!(code(&daemon, json!({"argv": ["true"], "cwd": "/no/such"})), "directory_not_found");
    assert_eq!(code(&daemon, json!({"argv": ["true"], "user": "nobody-here"})), "user_not_found");
    assert_eq!(code(&daemon, json!({"argv": []})), "invalid_request");
    assert_eq!(code(&daemon, json!({"argv": ["a\u{0}b"]})), "invalid_request");
    assert_eq!(code(&daemon, json!({"argv": ["true"], "timeout_ms": 0})), "invalid_request");
    assert_eq!(exec(&daemon, json!({"argv": ["true"]})).end, exited(0), "the fork is as good as before");
}

#[test]
fn users_directories_environment_and_input() {
    let daemon = fork_named_one();
    let answer =
        exec(&daemon, json!({"argv": ["sh", "-c", "id -un; pwd; echo $HOME $A"], "env": {"A": "1=2"}}));
    assert_eq!(answer.stdout, "root\n/\n/root 1=2\n");
    let request = json!({"argv": ["sh", "-c", "id -u; pwd; echo $A"], "user": "nobody", "cwd": "/usr/lib"});
    assert_eq!(exec(&daemon, request).stdout, "65534\n/usr/lib\n\n");
    let text = "line\n".repeat(60_000);
    let answer = exec(&daemon, json!({"argv": ["sh", "-c", "wc -l; cat"], "stdin": text}));
    assert_eq!(answer.stdout, "60000\n");
    let answer = exec(&daemon, json!({"argv": ["od", "-An", "-tx1"], "stdin_base64": "/wAK"}));
    assert_eq!(answer.stdout, " ff 00 0a\n");
    assert_eq!(exec(&daemon, json!({"argv": ["cat"]})).stdout, "", "no input is empty input");
}

#[test]
fn streams_both_ways() {
    let daemon = fork_named_one();
    let lines = [
        json!({"argv": ["sh", "-c", "read a; echo got $a; read b; echo then $b; cat >/dev/null; exit 3"]}),
        json!({"stdin": "first\n"}),
        json!({"stdin": "second\n"}),
    ];
    let body: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let ndjson = ("content-type", "application/x-ndjson");
    let reply = daemon.raw("POST", "/v1/forks/one/exec", &[ndjson], Some(body.as_bytes()));
    let text = String::from_utf8(reply.body).unwrap();
    let events: Vec<ExecEvent> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(matches!(events.first(), Some(ExecEvent::Started { .. })), "{text}");
    let output = events.iter().filter_map(|event| match event {
        ExecEvent::Stdout(output) => Some(output.bytes()),
        _ => None,
    });
    assert_eq!(output.collect::<Vec<_>>().concat(), b"got first\nthen second\n");
    assert!(matches!(events.last(), Some(ExecEvent::Exit(end)) if *end == exited(3)), "{text}");
}

#[test]
fn commands_run_side_by_side() {
    let daemon = fork_named_one();
    let start = Instant::now();
    std::thread::scope(|scope| {
        for number in 0..8 {
            let daemon = &daemon;
            scope.spawn(move || {
                let request = json!({"argv": ["sh", "-c", format!("sleep 2; echo {number}")]});
                assert_eq!(exec(daemon, request).stdout, format!("{number}\n"));
            });
        }
    });
    assert!(
        start.elapsed().as_secs_f64() < 14.0,
        "one after the other would take 16 s: {:?}",
        start.elapsed()
    );
}

#[test]
fn the_c_library_is_a_layer_of_its_own_and_a_file_like_any_other() {
    let daemon = fork_named_one();
    let root = daemon.sh("one", "grep -w overlay /proc/mounts");
    assert!(root.contains("lowerdir=/mnt/libraries:/mnt/lower,"), "{root}");
    let look = "cd /usr/lib/x86_64-linux-gnu; stat -c '%a %u %g %h' . libc.so.6; ls libc.so.6 libm.so.6";
    assert_eq!(daemon.sh("one", look), "755 0 0 1\n755 0 0 1\nlibc.so.6\nlibm.so.6");
    let replaced = "cd /usr/lib/x86_64-linux-gnu; cp -p libc.so.6 new; mv new libc.so.6; cp /bin/echo /tmp; /tmp/echo on";
    assert_eq!(daemon.sh("one", replaced), "on", "programs run with another C library");
    assert_eq!(
        daemon
            .sh("one", "cd /usr/lib/x86_64-linux-gnu; rm libm.so.6; ls libm.so.6 2>&1 || true")
            .lines()
            .count(),
        1
    );
}
