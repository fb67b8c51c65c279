//! Forks on TAP devices: what they reach, what they do not, and that nothing is left behind. Needs root.

use std::{
    fs,
    process::{Child, Command, Stdio},
    time::Duration,
};

use forkling_daemon::api::types::{ForkInfo, ForkNetworkInfo};
use forkling_tests::{api::Client, daemon::Daemon, eventually};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::{
    guest,
    network::{bulk_both_ways, servers::Web},
};

/// This host's loopback, as guests know it; there are no names with taps.
const HOST: &str = "169.254.1.2";

/// A machine beyond this host: a network namespace with HTTP servers on ports 8000 and 8001.
struct Far(Vec<Child>);

impl Far {
    const V4: &str = "10.9.0.2";
    const V6: &str = "fd09::2";
    /// This host, on the wire to it.
    const NEAR: &str = "10.9.0.1";

    fn start() -> Self {
        sh("ip netns add far && ip link add far0 type veth peer name eth0 netns far
            ip address add 10.9.0.1/24 dev far0 && ip address add fd09::1/64 dev far0 nodad && ip link set far0 up
            ip -n far address add 10.9.0.2/24 dev eth0 && ip -n far address add fd09::2/64 dev eth0 nodad
            ip -n far link set eth0 up && ip -n far link set lo up");
        let server = |port: &str| {
            Command::new("ip")
                .args(["netns", "exec", "far", "python3", "-m", "http.server", port, "--bind", "::"])
                .current_dir("/proc/sys/net/ipv4")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("ip is there")
        };
        let far = Self(vec![server("8000"), server("8001")]);
        for port in [8000, 8001] {
            let to = format!("{}:{port}", Self::V4);
            eventually(Duration::from_secs(60), "the far server listens", || {
                std::net::TcpStream::connect(&to).map(drop).map_err(|error| error.to_string())
            });
        }
        far
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        for server in &mut self.0 {
            let _ = server.kill();
            let _ = server.wait();
        }
        sh("ip link delete far0; ip netns delete far");
    }
}

fn sh(line: &str) -> String {
    let output = Command::new("sh").args(["-ec", line]).output().expect("sh is there");
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn forward() {
    fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("tests of TAP devices run as root");
    fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").expect("tests of TAP devices run as root");
}

/// A daemon with taps, and the template.
fn daemon_with(args: &[&str]) -> Daemon {
    forward();
    let mut settings = guest::settings().arg("--network").arg("tap");
    settings.args.extend(args.iter().map(|arg| (*arg).to_owned()));
    let daemon = settings.start();
    guest::ensure(&daemon, guest::ONE);
    daemon
}

fn fork_with(client: &Client, network: &Value) -> ForkInfo {
    let request = json!({"template": guest::ONE, "network": network, "timeout_ms": 300_000});
    client.forks_with(&request).pop().expect("one was asked for")
}

fn network(client: &Client, fork: &ForkInfo) -> ForkNetworkInfo {
    client.call("GET", &format!("/v1/forks/{}/network", fork.id), None).expect("a living fork has a network")
}

/// `200`, or what curl says.
fn get(client: &Client, fork: &ForkInfo, to: &str) -> String {
    let line = format!("curl -sS -g -m 20 -o /dev/null -w '%{{http_code}}' http://{to}/ 2>&1; true");
    client.sh(&fork.id, &line)
}

/// Refused at once, not lost.
fn refused(client: &Client, fork: &ForkInfo, to: &str) {
    let said = get(client, fork, to);
    assert!(said.contains("Couldn't connect") || said.contains("refused"), "{to}: {said:?}");
}

#[test]
fn a_fork_on_a_tap_reaches_what_it_may_and_nothing_else() {
    let daemon = daemon_with(&[]);
    let (far, web) = (Far::start(), Web::start());
    let (v4, v6) = (format!("{}:8000", Far::V4), format!("[{}]:8000", Far::V6));
    let fork = fork_with(&daemon, &json!({"egress": [v4, v6, format!("host:{}", web.port())]}));
    let other = fork_with(&daemon, &json!({"egress": ["internet"]}));
    for to in [v4.clone(), v6.clone()] {
        assert_eq!(get(&daemon, &fork, &to), "200", "{to}");
    }
    let page = format!("curl -sS -m 20 http://{HOST}:{}/size/5", web.port());
    assert_eq!(daemon.sh(&fork.id, &page), "01234");
    let place = other.network.clone().expect("it has a NIC");
    let (near, closed) = (format!("{}:8000", Far::NEAR), format!("{}:8001", Far::V4));
    let (beside, beside_v6) = (format!("{}:9000", place.ipv4), format!("[{}]:9000", place.ipv6));
    // Another port, this host by an address, other forks, the gateway, metadata, public addresses.
    for to in [
        closed.as_str(),
        &near,
        &beside,
        &beside_v6,
        "169.254.1.1:53",
        "169.254.169.254:80",
        "8.8.8.8:443",
        "[2001:4860:4860::8888]:443",
        "169.254.2.0:80",
    ] {
        refused(&daemon, &fork, to);
    }
    // `internet` is no way to what is special.
    for to in [v4.as_str(), &v6, &near, "169.254.169.254:80"] {
        refused(&daemon, &other, to);
    }
    let info = network(&daemon, &fork);
    assert_eq!(serde_json::to_value(info.network.backend).unwrap(), "tap");
    assert!(info.counters.denied >= 9 && info.counters.flows_opened >= 3, "{info:?}");
    assert!(info.counters.bytes_to_guest > 0 && info.counters.frames_from_guest > 0, "{info:?}");

    // Under an address that is not its own.
    let spoof = format!(
        "ip address add {}/32 dev eth0; curl -sS -m 3 --interface {} http://{v4}/ 2>&1; true",
        place.ipv4, place.ipv4
    );
    let said = daemon.sh(&fork.id, &spoof);
    assert!(said.contains("timed out") || said.contains("timeout"), "{said}");
    assert!(network(&daemon, &fork).counters.frames_refused >= 1);
    drop(far);
}

#[test]
fn a_policy_changed_cuts_what_it_does_not_allow() {
    let daemon = daemon_with(&[]);
    let (_far, web) = (Far::start(), Web::start());
    let (kept, lost) = (format!("host:{}", web.port()), format!("{}:8000", Far::V4));
    let fork = fork_with(&daemon, &json!({"egress": [kept, lost]}));
    let hold = |name: &str, host: &str, port: u16| {
        format!(
            "setsid python3 -c '
import socket, time
s = socket.create_connection((\"{host}\", {port})); open(\"/run/{name}\", \"w\").write(\"open\")
while True:
    try: s.sendall(b\"x\"); time.sleep(0.1)
    except OSError: open(\"/run/{name}\", \"w\").write(\"cut\"); break
' >/dev/null 2>&1 </dev/null & until grep -q open /run/{name}; do sleep 0.1; done"
        )
    };
    daemon.sh(&fork.id, &hold("kept", HOST, web.port()));
    daemon.sh(&fork.id, &hold("lost", Far::V4, 8000));
    assert_eq!(network(&daemon, &fork).counters.flows, 2);
    let change = json!({"egress": [kept]});
    let path = format!("/v1/forks/{}/network", fork.id);
    let changed: ForkNetworkInfo = daemon.call("PUT", &path, Some(&change)).unwrap();
    assert_eq!(changed.counters.flows, 1);
    let ended =
        "for i in $(seq 100); do grep -q cut /run/lost && break; sleep 0.1; done; cat /run/lost /run/kept";
    assert_eq!(daemon.sh(&fork.id, ended), "cutopen");
    refused(&daemon, &fork, &lost);
    let named = json!({"egress": ["example.com:443"]});
    let error = daemon.call::<ForkNetworkInfo>("PUT", &path, Some(&named)).expect_err("taps know no names");
    assert_eq!(error.code, "names_unsupported");
}

#[test]
fn bulk_passes_whole_both_ways_over_a_tap() {
    const BYTES: usize = 32 << 20;
    let daemon = daemon_with(&[]);
    let web = Web::start();
    let fork = fork_with(&daemon, &json!({"egress": [format!("host:{}", web.port())]}));
    let url = format!("http://{HOST}:{}", web.port());
    bulk_both_ways(&daemon, &fork.id, &web, &url, BYTES);
    let info = network(&daemon, &fork);
    assert!(info.counters.bytes_to_guest > 2 * BYTES as u64, "{info:?}");
    assert!(info.counters.bytes_from_guest > BYTES as u64, "{info:?}");
}

#[test]
fn a_group_on_taps_reaches_itself_out_of_the_pool_and_after_a_reset() {
    let daemon = daemon_with(&[]);
    let web = Web::start();
    daemon.park(guest::ONE, 2);
    let request = json!({
        "template": guest::ONE, "count": 2, "timeout_ms": 300_000,
        "network": {"group": "left", "egress": [format!("host:{}", web.port())]},
    });
    let workers = daemon.forks_with(&request);
    assert!(workers.iter().all(|fork| fork.parked), "both were parked");
    let stranger = fork_with(&daemon, &json!({"group": "right"}));
    let serve = "setsid python3 -m http.server 9000 --bind :: >/dev/null 2>&1 </dev/null &
                 until curl -s -o /dev/null http://127.0.0.1:9000/; do sleep 0.2; done; echo up";
    assert_eq!(daemon.sh(&workers[1].id, serve), "up");
    let place = workers[1].network.clone().expect("it has a NIC");
    let addresses = [format!("{}:9000", place.ipv4), format!("[{}]:9000", place.ipv6)];
    for to in &addresses {
        assert_eq!(get(&daemon, &workers[0], to), "200", "{to}");
        refused(&daemon, &stranger, to);
    }
    // A reset fork has the same place, can use it, and nothing of its connections is left.
    let hold = format!(
        "setsid python3 -c 'import socket, time; s = socket.create_connection((\"{HOST}\", {})); time.sleep(999)' \
         >/dev/null 2>&1 </dev/null & until ss -Htn state established | grep -q {HOST}; do sleep 0.1; done",
        web.port()
    );
    daemon.sh(&workers[0].id, &hold);
    let path = format!("/v1/forks/{}/reset", workers[0].id);
    daemon.call::<ForkInfo>("POST", &path, Some(&json!({}))).unwrap();
    assert_eq!(network(&daemon, &workers[0]).counters.flows, 0);
    assert_eq!(get(&daemon, &workers[0], &addresses[0]), "200");
    let page = format!("curl -sS -m 20 http://{HOST}:{}/size/3", web.port());
    assert_eq!(daemon.sh(&workers[0].id, &page), "012");
}

#[test]
fn what_taps_cannot_do_is_refused_before_any_fork_starts() {
    let daemon = daemon_with(&["--taps", "2"]);
    let error = |network: Value| {
        let request = json!({"template": guest::ONE, "network": network});
        daemon.create(&request).expect_err("it cannot be").code
    };
    assert_eq!(error(json!({"egress": ["example.com:443"]})), "names_unsupported");
    assert_eq!(error(json!({"egress": ["*.example.com"]})), "names_unsupported");
    assert_eq!(error(json!({"ipv4": "10.0.0.1"})), "invalid_address");
    assert_eq!(daemon.list(true).len(), 0, "nothing was started");
    let chosen = fork_with(&daemon, &json!({"ipv4": "100.64.7.7"}));
    assert_eq!(chosen.network.unwrap().ipv4.to_string(), "100.64.7.7");
    assert_eq!(error(json!({"ipv4": "100.64.7.7"})), "address_taken");
    daemon.fork(guest::ONE);
    let request = json!({"template": guest::ONE, "timeout_ms": 300_000});
    let answer = serde_json::to_value(daemon.create(&request)).unwrap();
    assert!(answer.to_string().contains("taps_exhausted"), "{answer}");
    daemon.kill(&chosen.id).unwrap();
    // A tap comes back with the end of its fork.
    eventually(Duration::from_secs(30), "there is a tap again", || {
        let forks = daemon.create(&request).map_err(|error| error.code)?;
        let answer = serde_json::to_value(forks).unwrap().to_string();
        if answer.contains("taps_exhausted") { Err(answer) } else { Ok(()) }
    });
}

/// Tables and interfaces of daemons with taps on this host.
fn left() -> String {
    sh("nft list tables; ip -o link")
        .lines()
        .filter(|line| line.contains("forkling"))
        .map(|line| format!("{line}\n"))
        .collect()
}

#[test]
fn nothing_of_the_tap_network_is_left_behind() {
    let daemon = daemon_with(&[]);
    fork_with(&daemon, &json!({"egress": ["internet"]}));
    assert!(left().contains("table inet forkling") && left().contains("forkling0@"), "{}", left());
    let (status, _) = daemon.stop();
    assert!(status.success());
    assert_eq!(left(), "");

    // What a killed one leaves goes with the next one's start: its table, since its namespace has gone with it.
    let daemon = daemon_with(&[]);
    fork_with(&daemon, &json!({}));
    daemon.crash();
    eventually(Duration::from_secs(30), "the namespace goes with its daemon", || {
        if left().contains("forkling0@") { Err(left()) } else { Ok(()) }
    });
    assert!(left().contains("table inet forkling0"), "{}", left());
    sh("nft add table inet forkling7");
    let daemon = daemon_with(&[]);
    assert!(daemon.log().contains("removing the rules of a daemon that was killed"), "{}", daemon.log());
    assert!(!left().contains("forkling7"), "{}", left());
    forkling_tests::proc::signal(daemon.pid(), Signal::INT);
    eventually(Duration::from_secs(30), "it ends", || if left().is_empty() { Ok(()) } else { Err(left()) });
}
