//! Whatever is asked for, the answer is typed, says what to do, and nothing is left running.

use std::{
    fs,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    time::Duration,
};

use forkling_daemon::api::types::{ErrorAnswer, ErrorBody, ForkResult, Kind};
use forkling_tests::{
    daemon::{Daemon, Settings},
    eventually, proc, spec,
};
use serde_json::{Value, json};

fn typed(what: &str, error: &ErrorBody, code: &str) {
    assert_eq!(error.code, code, "{what}: {error:?}");
    assert!(!error.message.is_empty() && error.remediation.len() > 10, "{what}: {error:?}");
}

/// Nothing but the zygote of `null` runs, and nothing but its template is on disk.
fn nothing_left(daemon: &Daemon) {
    daemon.settle(1);
    assert!(daemon.list(false).is_empty());
    eventually(Duration::from_secs(5), "scratch directories are removed", || {
        let entries = fs::read_dir(daemon.settings.state().join("templates")).unwrap();
        let names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        if names == ["null"] { Ok(()) } else { Err(format!("{names:?}")) }
    });
}

/// Names that are none, as text and as they stand in a path.
fn bad_names() -> Vec<(String, String)> {
    let long = "a".repeat(300);
    vec![
        ("../x".to_owned(), "..%2Fx".to_owned()),
        ("..".to_owned(), "%2E%2E".to_owned()),
        (String::new(), String::new()),
        (long.clone(), long),
        ("a\0b".to_owned(), "a%00b".to_owned()),
        ("/etc/passwd".to_owned(), "%2Fetc%2Fpasswd".to_owned()),
        ("a/b".to_owned(), "a%2Fb".to_owned()),
        (".hidden".to_owned(), ".hidden".to_owned()),
        ("Upper".to_owned(), "Upper".to_owned()),
        ("ümlaut".to_owned(), "%C3%BCmlaut".to_owned()),
        ("\u{202e}x".to_owned(), "%E2%80%AEx".to_owned()),
    ]
}

#[test]
fn names() {
    let daemon = Daemon::with_null();
    let living = daemon.fork("null");
    let null = daemon.settings.null_guest();
    for (text, path) in bad_names() {
        let error = daemon.create(&json!({"template": text})).unwrap_err();
        typed(&text, &error, "invalid_name");
        let error = daemon.create(&json!({"template": "null", "names": [text]})).unwrap_err();
        typed(&text, &error, "invalid_name");
        typed(&text, &daemon.build(&spec::null(&text, &null)).outcome.unwrap_err(), "invalid_name");
        typed(&text, &daemon.snapshot(&living.id, &text).unwrap_err(), "invalid_name");
        for verb in ["GET", "DELETE"] {
            for kind in ["templates", "forks"] {
                let error = daemon.call::<Value>(verb, &format!("/v1/{kind}/{path}"), None).unwrap_err();
                typed(&format!("{verb} {kind} {text:?}"), &error, "invalid_name");
            }
        }
        let exec = format!("/v1/forks/{path}/exec");
        let error = daemon.call::<Value>("POST", &exec, Some(&json!({"argv": ["true"]}))).unwrap_err();
        assert!(["invalid_name", "no_such_route"].contains(&error.code.as_str()), "{error:?}");
    }
    typed("unknown template", &daemon.template("nobody").unwrap_err(), "template_not_found");
    typed("unknown template", &daemon.remove_template("nobody").unwrap_err(), "template_not_found");
    typed("unknown template", &daemon.reload("nobody").unwrap_err(), "template_not_found");
    typed(
        "unknown template",
        &daemon.create(&json!({"template": "nobody"})).unwrap_err(),
        "template_not_found",
    );
    typed("unknown fork", &daemon.inspect("f-nobody").unwrap_err(), "fork_not_found");
    typed("unknown fork", &daemon.kill("f-nobody").unwrap_err(), "fork_not_found");
    typed("name taken", &daemon.build(&spec::null("null", &null)).outcome.unwrap_err(), "template_exists");
    typed("template in use", &daemon.remove_template("null").unwrap_err(), "template_in_use");
    let exec = daemon.exec(&living.id, &json!({"argv": ["true"]})).unwrap_err();
    typed("exec in a null guest", &exec, "no_agent");
    daemon.kill_all();
    nothing_left(&daemon);
}

#[test]
fn counts_and_fields() {
    let daemon = Daemon::with_null();
    for count in [0, 1_001, 1_000_000, u32::MAX] {
        let error = daemon.create(&json!({"template": "null", "count": count})).unwrap_err();
        typed(&count.to_string(), &error, "invalid_count");
    }
    let long = "x".repeat(20_000);
    let requests = [
        json!({"template": "null", "count": -1}),
        json!({"template": "null", "count": "many"}),
        json!({"template": "null", "cuont": 1}),
        json!({"template": "null", "count": 2, "names": ["one"]}),
        json!({"template": "null", "timeout_ms": 0}),
        json!({"template": "null", "timeout_ms": u64::MAX}),
        json!({"template": "null", "metadata": {"k": long}}),
        json!({"template": "null", "env": {"A=B": "x"}}),
        json!({"template": "null", "env": {"A": "x\u{0}"}}),
        json!([]),
        json!(null),
    ];
    for request in requests {
        typed(&request.to_string(), &daemon.create(&request).unwrap_err(), "invalid_request");
    }
    let error = daemon.create(&json!({"template": "null", "env": {"A": long}})).unwrap_err();
    typed("long environment", &error, "environment_too_large");
    for (method, path, body, code) in [
        ("POST", "/v1/forks", &b"{\"template\": "[..], "invalid_request"),
        ("POST", "/v1/forks", b"\xff\xfe", "invalid_request"),
        ("POST", "/v1/forks", b"", "invalid_request"),
        ("PATCH", "/v1/forks", b"{}", "method_not_allowed"),
        ("POST", "/v2/forks", b"{}", "no_such_route"),
        ("POST", "/v1/forks", &vec![b' '; 3 << 20], "body_too_large"),
    ] {
        let reply = daemon.raw(method, path, &[], Some(body));
        let answer: ErrorAnswer = serde_json::from_slice(&reply.body).unwrap();
        typed(path, &answer.error, code);
        assert!((400..500).contains(&reply.status));
        assert_eq!(answer.error.kind, Kind::Request);
    }
    nothing_left(&daemon);
}

fn file(daemon: &Daemon, name: &str, content: &[u8]) -> PathBuf {
    let path = daemon.settings.path().join(name);
    fs::write(&path, content).unwrap();
    path
}

#[test]
fn kernels_roots_and_memory() {
    let daemon = Daemon::with_null();
    let refused = |what: &str, spec: Value, codes: &[&str]| {
        let error = daemon.build(&spec).outcome.unwrap_err();
        assert!(codes.contains(&error.code.as_str()), "{what}: {error:?}");
        typed(what, &error, &error.code);
        nothing_left(&daemon);
    };
    let linux = |kernel: &Path| json!({"name": "t", "kernel": kernel, "memory_mib": 128});
    let text = file(&daemon, "text", b"this is no kernel\n");
    let empty = file(&daemon, "empty", b"");
    let elf = file(&daemon, "elf", &[b"\x7fELF\x02\x01\x01".as_slice(), &[0; 57]].concat());
    let own = std::env::current_exe().unwrap();
    refused("no kernel there", linux(Path::new("/no/such/kernel")), &["file_not_found"]);
    refused("a directory as kernel", linux(Path::new("/tmp")), &["file_not_found"]);
    refused("a relative path", linux(Path::new("vmlinuz")), &["invalid_request"]);
    refused("no kernel named", json!({"name": "t"}), &["kernel_missing"]);
    for kernel in [&text, &empty, &elf, &own] {
        refused("not a kernel", linux(kernel), &["build_refused"]);
    }
    let long = file(&daemon, "long", &vec![0x90; 2 << 20]);
    refused("a null guest that is too long", spec::null("t", &long), &["build_refused"]);
    let with_root = |root: &str| json!({"name": "t", "kernel": text, "memory_mib": 128, "root": root});
    refused("no root there", with_root("/no/such/root.tar"), &["file_not_found"]);
    refused("a root that is no archive", with_root(text.to_str().unwrap()), &["root_not_archive"]);
    refused("a device as root", with_root("/dev/null"), &["root_not_archive"]);
    let broken = file(&daemon, "broken.tar.gz", b"\x1f\x8b\x08\x00broken");
    refused("a broken archive", with_root(broken.to_str().unwrap()), &["tool_failed"]);
    let null = daemon.settings.null_guest();
    for memory in [0, 1, 63, 65_537, u32::MAX] {
        let mut spec = spec::null("t", &null);
        spec["memory_mib"] = json!(memory);
        refused("memory", spec, &["memory_out_of_range"]);
    }
    let host = proc::kib_field("/proc/meminfo", "MemTotal").unwrap() >> 20;
    if host < 65_536 {
        let mut spec = spec::null("t", &null);
        spec["memory_mib"] = json!(host + 1);
        refused("more than the host's memory", spec, &["memory_exceeds_host"]);
    }
    for (field, value) in [
        ("vcpus", json!(0)),
        ("vcpus", json!(9)),
        ("vcpus", json!(-1)),
        ("cpu", json!("x86-64-v9")),
        ("payload", json!("windows")),
        ("root", json!("/dev/null")),
        ("warm_up", json!([["true"]])),
        ("cmdline", json!("x".repeat(5000))),
        ("unknown", json!(1)),
    ] {
        let mut spec = spec::null("t", &null);
        spec[field] = value;
        refused(field, spec, &["invalid_request"]);
    }
}

#[test]
fn sockets_and_directories() {
    let daemon = Daemon::start();
    let (status, said) = daemon.settings.refused();
    assert!(!status.success() && said.contains("in use") && said.contains("--socket"), "{said}");
    assert!(daemon.version().is_some(), "the first daemon goes on");

    let long = format!("/tmp/{}", "x".repeat(200));
    let (status, said) = Settings::default().arg("--socket").arg(&long).refused();
    assert!(!status.success() && said.contains("107") && said.contains("--socket"), "{said}");

    let settings = Settings::default();
    fs::create_dir(settings.path().join("run")).unwrap();
    let foreign = UnixListener::bind(settings.socket()).unwrap();
    let (status, said) = settings.refused();
    assert!(!status.success() && said.contains("in use"), "{said}");
    drop(foreign);
    drop(settings.start());

    let settings = Settings::default();
    fs::create_dir(settings.path().join("run")).unwrap();
    fs::write(settings.socket(), "precious").unwrap();
    let (status, said) = settings.refused();
    assert!(!status.success() && said.contains("not a socket"), "{said}");
    assert_eq!(fs::read(settings.socket()).unwrap(), b"precious");
}

#[test]
fn kvm_that_is_not_permitted() {
    if !rustix::process::geteuid().is_root() {
        println!("not shown: only root can start a daemon as a user without /dev/kvm");
        return;
    }
    /// `nobody`, in no group.
    const NOBODY: (u32, u32) = (65_534, 65_534);
    let settings = Settings::default().as_user(NOBODY.0, NOBODY.1);
    let with_template = Daemon::with_null();
    let templates = settings.state().join("templates");
    fs::create_dir_all(&templates).unwrap();
    let from = with_template.settings.state().join("templates/null");
    assert!(std::process::Command::new("cp").arg("-a").args([&from, &templates]).status().unwrap().success());
    settings.give_away();
    let daemon = settings.start();
    let built = daemon.build(&spec::null("t", &settings.null_guest()));
    let error = built.outcome.unwrap_err();
    typed("build", &error, &error.code);
    let said = format!("{error:?}");
    assert!(said.contains("/dev/kvm") && said.contains("group kvm"), "{said}");
    let results = daemon.create(&json!({"template": "null"})).unwrap();
    let ForkResult::Error(error) = &results[0] else { panic!("it runs: {results:?}") };
    typed("fork", error, "fork_failed");
    assert!(format!("{error:?}").contains("/dev/kvm"), "{error:?}");
    daemon.settle(0);
}

#[test]
fn taps_without_privilege_are_refused_at_the_start() {
    let settings = Settings::default().as_user(65_534, 65_534).arg("--network").arg("tap");
    settings.give_away();
    let (status, said) = settings.refused();
    assert!(!status.success());
    assert!(said.contains("CAP_NET_ADMIN") && said.contains("--network user"), "{said}");
}
