//! The network of forks: what they reach, what they do not, how much passes.
//!
//! Servers are threads of the test and processes beside it; guests reach them as `host`.

use std::{fs, thread};

use forkling_daemon::api::types::{ForkInfo, ForkNetworkInfo};
use forkling_tests::{api::Client, daemon::Daemon, proc};
use serde_json::{Value, json};

use crate::guest;
use servers::{Secure, Web, udp_echo};
use world::World;

pub mod servers;
mod world;

/// Name under which guests know the host.
const HOST: &str = "host.forkling.internal";

fn fork_with(client: &Client, network: &Value) -> ForkInfo {
    let request = json!({"template": guest::ONE, "network": network, "timeout_ms": 300_000});
    client.forks_with(&request).pop().expect("one was asked for")
}

fn network(client: &Client, fork: &ForkInfo) -> ForkNetworkInfo {
    let path = format!("/v1/forks/{}/network", fork.id);
    client.call("GET", &path, None).expect("a living fork has a network")
}

/// Whether a TCP connection is made, and how it ended if not.
fn connects(client: &Client, fork: &ForkInfo, host: &str, port: u16) -> String {
    let line = format!("curl -sS -g -o /dev/null -m 20 http://{host}:{port}/ 2>&1; true");
    client.sh(&fork.id, &line)
}

fn denied(info: &ForkNetworkInfo, what: &str) -> usize {
    info.denials.iter().filter(|denial| denial.what == what).count()
}

#[test]
fn a_fork_reaches_what_it_may_and_nothing_else() {
    let daemon = guest::daemon();
    let (open, closed) = (Web::start(), Web::start());
    let fork = fork_with(&daemon, &json!({"egress": [format!("host:{}", open.port())]}));
    let page = |port| format!("curl -sS -m 20 http://{HOST}:{port}/size/5");
    assert_eq!(daemon.sh(&fork.id, &page(open.port())), "01234");
    let refused = |fork: &ForkInfo, host: &str, port| {
        let said = connects(&daemon, fork, host, port);
        assert!(said.contains("Couldn't connect") || said.contains("refused"), "{host}:{port}: {said:?}");
    };
    refused(&fork, HOST, closed.port());
    // Its own gateway, another range, this host by an address, a public address that no name led to, IPv6.
    for host in
        ["169.254.1.1", "169.254.169.254", "10.0.0.1", "192.168.1.1", "8.8.8.8", "[2001:4860:4860::8888]"]
    {
        refused(&fork, host, 80);
    }
    let info = network(&daemon, &fork);
    assert!(denied(&info, "tcp") >= 6, "{info:?}");
    let port = Some(closed.port());
    assert!(info.denials.iter().any(|denial| denial.port == port), "{info:?}");
    assert_eq!(closed.requests(), 0);
    assert!(info.counters.flows_opened >= 1 && info.counters.denied >= 6, "{info:?}");

    // Changed while it runs.
    let path = format!("/v1/forks/{}/network", fork.id);
    let rules = json!({"egress": [format!("tcp://host:{}", closed.port())]});
    let changed: ForkNetworkInfo = daemon.call("PUT", &path, Some(&rules)).unwrap();
    assert_eq!(changed.network.egress.len(), 1);
    assert_eq!(daemon.sh(&fork.id, &page(closed.port())), "01234");
    refused(&fork, HOST, open.port());

    // A fork that says nothing gets what its template allows: nothing.
    let silent = daemon.fork(guest::ONE);
    refused(&silent, HOST, open.port());
    assert_eq!(daemon.sh(&silent.id, "getent hosts example.com || echo none"), "none");
    let info = network(&daemon, &silent);
    assert!(denied(&info, "dns") >= 1 && info.counters.names_asked >= 1, "{info:?}");
}

#[test]
fn a_name_opens_what_it_resolves_to_and_nothing_else() {
    let world = World::start();
    let daemon = world.settings().start();
    guest::ensure(&daemon, guest::ONE);
    let rules = json!({"egress": ["open.example:80,443", "private.example"]});
    let fork = fork_with(&daemon, &rules);
    let ca = fs::read_to_string(world.certificate()).unwrap();
    daemon.sh(&fork.id, &format!("cat >/tmp/ca.pem <<'E'\n{ca}\nE"));
    let get = |url: &str| {
        let line = format!("curl -sS -m 60 --cacert /tmp/ca.pem {url} 2>&1; true");
        daemon.sh(&fork.id, &line)
    };
    let refused = |url: &str| {
        let said = get(url);
        let how = ["Couldn't connect", "Could not resolve", "refused"];
        assert!(how.iter().any(|how| said.contains(how)), "{url}: {said:?}");
    };
    // Before its name is known, the address is as closed as any.
    refused("http://11.0.0.1/");
    assert_eq!(get("http://open.example/"), "the outside");
    assert!(get("https://open.example/").contains("Cipher"), "TLS passes");
    assert_eq!(get("http://11.0.0.1/"), "the outside");
    refused("http://open.example:8080/");
    refused("http://closed.example/");
    refused("http://unknown.example/");
    refused("http://11.0.0.2/");
    refused("http://11.0.0.254/");
    // An allowed name that leads to an address which no name may lead to, though the daemon's host reaches it.
    refused("http://private.example/");
    refused("http://10.9.9.9/");
    let resolver = "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5)
try:
    s.sendto(b'x' * 12, ('11.0.0.254', 53)); print(s.recv(512))
except OSError as error: print(type(error).__name__)";
    let said = daemon.sh(&fork.id, &format!("python3 -c \"{resolver}\""));
    assert!(
        ["TimeoutError", "ConnectionRefusedError", "OSError", "PermissionError"].contains(&said.as_str()),
        "{said}"
    );
    let info = network(&daemon, &fork);
    let names: Vec<_> = info
        .denials
        .iter()
        .filter(|denial| denial.what == "dns")
        .filter_map(|denial| denial.name.clone())
        .collect();
    assert!(names.iter().any(|name| name == "closed.example"), "{info:?}");
    assert!(denied(&info, "tcp") >= 5 && denied(&info, "udp") >= 1, "{info:?}");
}

/// Has a fork load `bytes` from the server at `url`, and send them back; they arrive as they were.
pub fn bulk_both_ways(client: &Client, fork: &str, web: &Web, url: &str, bytes: usize) {
    let download = format!("curl -sS -m 600 {url}/size/{bytes} | sha256sum | cut -c1-64");
    assert_eq!(client.sh(fork, &download), web.digest(bytes));
    let upload = format!(
        "curl -sS -m 600 {url}/size/{bytes} -o /tmp/blob && curl -sS -m 600 -T /tmp/blob {url}/upload && rm /tmp/blob"
    );
    assert_eq!(client.sh(fork, &upload), web.digest(bytes));
}

#[test]
fn bulk_passes_whole_both_ways_and_on_many_connections() {
    const BYTES: usize = 32 << 20;
    let daemon = guest::daemon();
    let web = Web::start();
    let fork = fork_with(&daemon, &json!({"egress": [format!("host:{}", web.port())]}));
    let url = format!("http://{HOST}:{}", web.port());
    bulk_both_ways(&daemon, &fork.id, &web, &url, BYTES);
    let parallel = format!(
        "curl -sS -m 600 --parallel --parallel-immediate --parallel-max 200 '{url}/size/20000?[1-200]' -o '/tmp/p#1' &&
         cat /tmp/p* | wc -c && sha256sum /tmp/p* | cut -c1-64 | sort -u"
    );
    assert_eq!(daemon.sh(&fork.id, &parallel), format!("{}\n{}", 200 * 20_000, web.digest(20_000)));
    let info = network(&daemon, &fork);
    assert!(info.counters.flows_opened >= 202, "{info:?}");
    assert_eq!(info.counters.denied, 0, "{info:?}");
}

#[test]
fn tls_udp_and_ping_pass() {
    let daemon = guest::daemon();
    let (secure, udp) = (Secure::start(), udp_echo());
    let rules = json!({"egress": [format!("tcp://host:{}", secure.port()), format!("udp://host:{udp}")]});
    let fork = fork_with(&daemon, &rules);
    let ca = fs::read_to_string(secure.certificate()).unwrap();
    let line = format!(
        "cat >/tmp/ca.pem <<'E'\n{ca}\nE\ncurl -sS -m 60 --cacert /tmp/ca.pem https://{HOST}:{}/ | grep -c Cipher",
        secure.port()
    );
    assert_ne!(daemon.sh(&fork.id, &line), "0");
    let echo = format!(
        "python3 - <<'E'
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(30)
for size in (1, 1400, 1473, 9000, 60000):
    data = bytes(i % 251 for i in range(size))
    s.sendto(data, ('{HOST}', {udp}))
    assert s.recv(65536) == data, size
print('echoed')
E"
    );
    assert_eq!(daemon.sh(&fork.id, &echo), "echoed");
    assert_eq!(daemon.sh(&fork.id, "ping -q -c 3 -i 0.2 169.254.1.1 | grep -c ' 0% packet loss'"), "1");
}

#[test]
fn each_fork_is_itself_on_the_network_and_only_its_group_reaches_it() {
    let daemon = guest::daemon();
    daemon.park(guest::ONE, 1);
    let request = json!({
        "template": guest::ONE, "names": ["worker-0", "worker-1"], "network": {"group": "left"}, "timeout_ms": 300_000
    });
    let workers = daemon.forks_with(&request);
    let stranger = fork_with(&daemon, &json!({"group": "right"}));
    for fork in workers.iter().chain([&stranger]) {
        let place = fork.network.clone().expect("it has a NIC");
        let shown = daemon.sh(&fork.id, "ip -o addr show dev eth0; cat /sys/class/net/eth0/address");
        for own in [format!("inet {}/32", place.ipv4), format!("inet6 {}/128", place.ipv6), place.mac.clone()]
        {
            assert!(shown.contains(&own), "{own} not in {shown}");
        }
        let server = "setsid python3 -m http.server 9000 --bind :: >/dev/null 2>&1 </dev/null & exit 0";
        daemon.sh(&fork.id, server);
        let up = "until curl -s -o /dev/null http://127.0.0.1:9000/; do sleep 0.2; done; echo up";
        assert_eq!(daemon.sh(&fork.id, up), "up");
    }
    let mut places: Vec<_> =
        workers.iter().chain([&stranger]).map(|fork| fork.network.clone().unwrap().ipv4).collect();
    places.dedup();
    assert_eq!(places.len(), 3);
    let get = |host: &str| {
        format!("curl -sS -g -m 20 -o /dev/null -w '%{{http_code}}' 'http://{host}:9000/' 2>&1; true")
    };
    let to = |fork: &ForkInfo, host: &str| daemon.sh(&fork.id, &get(host));
    assert_eq!(to(&workers[0], "worker-1"), "200");
    assert_eq!(to(&workers[1], "worker-0.forkling.internal"), "200");
    let (v4, v6) = {
        let place = workers[1].network.clone().unwrap();
        (place.ipv4.to_string(), format!("[{}]", place.ipv6))
    };
    assert_eq!((to(&workers[0], &v4), to(&workers[0], &v6)), ("200".to_owned(), "200".to_owned()));
    for host in ["worker-1", &v4, &v6] {
        let said = to(&stranger, host);
        assert!(said.contains("Couldn't connect") || said.contains("resolve"), "{host}: {said}");
    }
    // A reset fork has the same place and can use it.
    daemon.call::<ForkInfo>("POST", &format!("/v1/forks/{}/reset", workers[0].id), Some(&json!({}))).unwrap();
    assert_eq!(to(&workers[0], "worker-1"), "200");
}

#[test]
fn dozens_of_forks_talk_at_once() {
    let daemon = guest::daemon();
    let web = Web::start();
    let request = json!({
        "template": guest::ONE, "count": 10, "timeout_ms": 600_000,
        "network": {"egress": [format!("host:{}", web.port())]},
    });
    // An emulated CPU runs the hooks of many at once for longer than a hook may take.
    let forks: Vec<_> = (0..3).flat_map(|_| daemon.forks_with(&request)).collect();
    let line = format!(
        "curl -sS -m 600 -o /tmp/it http://{HOST}:{}/size/100000 2>&1 && sha256sum </tmp/it | cut -c1-64; true",
        web.port()
    );
    thread::scope(|scope| {
        let talks: Vec<_> = forks.iter().map(|fork| scope.spawn(|| daemon.sh(&fork.id, &line))).collect();
        for talk in talks {
            assert_eq!(talk.join().unwrap(), web.digest(100_000));
        }
    });
    assert_eq!(web.requests(), forks.len());
}

/// Sends a byte now and then to the host, and writes down how that ended.
const HOLD: &str = "
import os, socket, sys, time
def say(what):
    with open('/run/held.new', 'w') as new:
        new.write(what)
    os.replace('/run/held.new', '/run/held')
s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
say('open')
while True:
    try:
        s.sendall(b'x'); time.sleep(0.1)
    except OSError as error:
        say(error.__class__.__name__); break
";

#[test]
fn connections_from_before_the_fork_are_reset() {
    let daemon = guest::daemon();
    let web = Web::start();
    let parent = fork_with(&daemon, &json!({"egress": [format!("host:{}", web.port())]}));
    let hold = format!(
        "setsid python3 -c \"{HOLD}\" {HOST} {} >/dev/null 2>&1 </dev/null &
         until grep -q open /run/held; do sleep 0.1; done",
        web.port()
    );
    daemon.sh(&parent.id, &hold);
    daemon.snapshot(&parent.id, "held").unwrap();
    let child = guest::forks(&daemon, "held", 1).remove(0);
    let ended = "for i in $(seq 300); do grep -q open /run/held || break; sleep 0.1; done; cat /run/held";
    let said = daemon.sh(&child.id, ended);
    assert!(["ConnectionResetError", "BrokenPipeError"].contains(&said.as_str()), "{said}");
    assert_eq!(daemon.sh(&parent.id, "cat /run/held"), "open", "the parent's lives on");
    daemon.kill_all();
    daemon.remove_template("held").unwrap();
}

#[test]
fn a_net_process_that_dies_is_replaced() {
    let daemon = guest::daemon();
    let web = Web::start();
    let fork = fork_with(&daemon, &json!({"egress": [format!("host:{}", web.port())]}));
    let line = format!(
        "curl -sS -m 20 --retry 20 --retry-all-errors --retry-delay 1 http://{HOST}:{}/size/3",
        web.port()
    );
    assert_eq!(daemon.sh(&fork.id, &line), "012");
    proc::kill(net_process(&daemon));
    assert_eq!(daemon.sh(&fork.id, &line), "012");
    assert!(daemon.log().contains("the net process is gone"), "it is said");
    assert!(daemon.inspect(&fork.id).unwrap().death.is_none());
}

fn net_process(daemon: &Daemon) -> i32 {
    let children = proc::children(daemon.pid());
    children
        .into_iter()
        .find(|&pid| proc::role(pid).as_deref() == Some("net"))
        .expect("there is a net process")
}

#[test]
fn what_cannot_be_is_refused_before_any_fork_starts() {
    let daemon = guest::daemon();
    let refused = |network: Value, count: u32| {
        let request = json!({"template": guest::ONE, "count": count, "network": network});
        daemon.create(&request).expect_err("it cannot be").code
    };
    assert_eq!(refused(json!({"egress": ["nowhere"]}), 1), "invalid_rule");
    assert_eq!(refused(json!({"egress": ["example.com:0"]}), 1), "invalid_rule");
    assert_eq!(refused(json!({"egress": ["10.0.0.1/8"]}), 1), "invalid_rule");
    assert_eq!(refused(json!({"group": "../x"}), 1), "invalid_name");
    assert_eq!(refused(json!({"ipv4": "10.0.0.1"}), 1), "invalid_address");
    assert_eq!(refused(json!({"ipv4": "100.64.0.9"}), 2), "invalid_address");
    assert_eq!(refused(json!({"ipv6": "::1"}), 1), "invalid_request");
    let chosen = fork_with(&daemon, &json!({"ipv4": "100.64.7.7"}));
    assert_eq!(chosen.network.unwrap().ipv4.to_string(), "100.64.7.7");
    assert_eq!(refused(json!({"ipv4": "100.64.7.7"}), 1), "address_taken");
    assert_eq!(daemon.list(true).len(), 1, "nothing else was started");
}
