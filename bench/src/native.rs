//! Forks of the null guest over the daemon's socket, on this host's KVM: one request after another on one kept
//! connection, each fork acknowledged and killed before the next. One JSON object a line on standard output.
//!
//! Usage: `forkling-bench-native [REQUESTS]`; programs are looked for as the tests do (`FORKLING_BIN`).

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Instant,
};

use anyhow::{Context as _, ensure};
use forkling_tests::daemon::Daemon;
use serde_json::{Value, json};

/// A kept connection.
struct Connection(BufReader<UnixStream>);

impl Connection {
    fn open(socket: &Path) -> anyhow::Result<Self> {
        Ok(Self(BufReader::new(UnixStream::connect(socket).context("cannot reach the daemon")?)))
    }

    /// Sends a request and reads its whole answer.
    fn call(&mut self, method: &str, path: &str, body: &str) -> anyhow::Result<Value> {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: forkling\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        self.0.get_mut().write_all(request.as_bytes())?;
        let mut status = String::new();
        self.0.read_line(&mut status)?;
        let mut length = 0;
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line)?;
            let Some((name, value)) = line.split_once(':') else { break };
            if name.eq_ignore_ascii_case("content-length") {
                length = value.trim().parse()?;
            }
        }
        let mut answer = vec![0; length];
        self.0.read_exact(&mut answer)?;
        ensure!(
            status.starts_with("HTTP/1.1 2"),
            "{method} {path}: {status}{}",
            String::from_utf8_lossy(&answer)
        );
        Ok(if answer.is_empty() { Value::Null } else { serde_json::from_slice(&answer)? })
    }
}

fn main() -> anyhow::Result<()> {
    let requests: usize =
        std::env::args().nth(1).map_or(Ok(1000), |text| text.parse()).context("REQUESTS")?;
    let daemon = Daemon::start();
    let kernel = daemon.settings.null_guest();
    let spec = json!({"name": "bench", "payload": "null", "memory_mib": 256, "kernel": kernel});
    let built = daemon.client.build(&spec);
    ensure!(built.outcome.is_ok(), "the null template cannot be built: {:?}", built.outcome);
    daemon.load("bench");
    // The image is filled behind the first fork.
    daemon.client.fork("bench");
    daemon.wait_complete("bench");
    let mut connection = Connection::open(&daemon.settings.socket())?;
    if let Ok(pool) = std::env::var("POOL") {
        let (low, rehearsal) = pool.split_once(':').context("POOL=N:REHEARSAL")?;
        let body = format!(r#"{{"low":{low},"high":{low},"rehearsal":"{rehearsal}"}}"#);
        connection.call("PUT", "/v1/templates/bench/pool", &body)?;
    }
    let mut phases: std::collections::BTreeMap<String, Vec<f64>> = Default::default();
    let mut acknowledged = Vec::with_capacity(requests);
    for _ in 0..requests {
        if std::env::var("POOL").is_ok() {
            loop {
                let info = connection.call("GET", "/v1/templates/bench/pool", "")?;
                if info["building"] == 0 && info["parked"] == info["low"] { break }
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        let began = Instant::now();
        let forks = connection.call("POST", "/v1/forks", r#"{"template":"bench"}"#)?;
        acknowledged.push(began.elapsed().as_secs_f64() * 1e3);
        let id = forks[0]["fork"]["id"].as_str().with_context(|| format!("no fork: {forks}"))?;
        if std::env::var("POOL").is_ok() && forks[0]["fork"]["parked"] != true { eprintln!("miss: {forks}"); }
        for (k, v) in forks[0]["fork"]["timings_us"].as_object().unwrap() { phases.entry(k.clone()).or_default().push(v.as_f64().unwrap()); }
        connection.call("DELETE", &format!("/v1/forks/{id}"), "")?;
    }
    report("native.null.no_pool.ack", &mut acknowledged);
    for (k, mut v) in phases { v.sort_by(f64::total_cmp); eprintln!("{k}: p50 {} p99 {}", v[v.len()/2], v[v.len()*99/100]); }
    Ok(())
}

/// Prints a figure in milliseconds.
fn report(id: &str, samples: &mut [f64]) {
    samples.sort_by(f64::total_cmp);
    let at = |share: f64| samples[((samples.len() - 1) as f64 * share) as usize];
    let kvm = forkling_vmm::host::kvm_flavour();
    let line = json!({
        "id": id, "unit": "ms", "n": samples.len(), "min": at(0.0), "p50": at(0.5), "p99": at(0.99), "max": at(1.0),
        "where": "native", "kvm": kvm,
    });
    println!("{line}");
}
