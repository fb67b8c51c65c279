//! A request makes forks that run, each with an identity of its own; a kill ends them.

use std::collections::HashSet;

use forkling_daemon::api::types::{ForkState, TemplateState};
use forkling_tests::{daemon::Daemon, proc};
use serde_json::json;

#[test]
fn sixteen_forks_run_and_are_killed() {
    let daemon = Daemon::with_null();
    let template = daemon.template("null").unwrap();
    assert_eq!(template.state, TemplateState::Ready);
    let forks = daemon.forks("null", 16);
    assert_eq!(forks.len(), 16);
    let children = proc::children(daemon.pid());
    for fork in &forks {
        assert_eq!(fork.state, ForkState::Running);
        assert!(children.contains(&fork.pid.unwrap()), "a fork is a process and a child of the daemon");
        let timings = fork.timings_us.unwrap();
        assert!(timings.guest > 0.0 && timings.total >= timings.guest + timings.fork, "{timings:?}");
    }
    let pids: HashSet<_> = forks.iter().map(|fork| fork.pid.unwrap()).collect();
    assert_eq!(pids.len(), 16);
    assert_eq!(daemon.list(false).len(), 16);
    assert_eq!(daemon.template("null").unwrap().forks, 16);
    for fork in &forks {
        daemon.kill(&fork.id).unwrap();
        assert_eq!(daemon.inspect(&fork.id).unwrap().state, ForkState::Died);
    }
    daemon.settle(1);
    assert_eq!(daemon.list(false).len(), 0);
    daemon.remove_template("null").unwrap();
    daemon.settle(0);
    assert!(daemon.templates().is_empty());
    assert!(!daemon.settings.snapshot("null").exists(), "a removed template leaves nothing on disk");
}

#[test]
fn identities_never_repeat() {
    let daemon = Daemon::with_null();
    let first = daemon.forks("null", 16);
    daemon.kill_all();
    let second = daemon.forks("null", 16);
    let (status, settings) = daemon.stop();
    assert!(status.success(), "{status}");
    let daemon = settings.start();
    let third = daemon.forks("null", 16);
    let all: Vec<_> = [first, second, third].concat();
    let different = |what: &dyn Fn(usize) -> String| {
        let values: HashSet<_> = (0..all.len()).map(what).collect();
        assert_eq!(values.len(), all.len(), "{values:?}");
    };
    different(&|at| all[at].id.clone());
    different(&|at| all[at].machine_id.clone());
    different(&|at| all[at].hostname.clone());
    different(&|at| all[at].generation.to_string());
}

#[test]
fn names_metadata_and_retries() {
    let daemon = Daemon::with_null();
    let request = json!({"template": "null", "count": 3, "name_prefix": "web", "metadata": {"job": "7"}});
    let body = serde_json::to_vec(&request).unwrap();
    let once = daemon.raw("POST", "/v1/forks", &[("idempotency-key", "k1")], Some(&body));
    let again = daemon.raw("POST", "/v1/forks", &[("idempotency-key", "k1")], Some(&body));
    assert_eq!((once.status, again.status), (201, 201));
    assert_eq!(once.body, again.body, "a retry with the same key gets the same forks");
    assert!(once.header("server-timing").unwrap().contains("guest;dur="));
    assert_eq!(daemon.list(false).len(), 3);
    let web = daemon.inspect("web-1").unwrap();
    assert_eq!((web.name.as_deref(), web.metadata["job"].as_str()), (Some("web-1"), "7"));
    let clash = daemon.create(&json!({"template": "null", "names": ["web-1"]})).unwrap();
    let clash = serde_json::to_value(&clash[0]).unwrap();
    assert_eq!(clash["error"]["code"], "fork_exists");
    daemon.kill("web-1").unwrap();
    assert_eq!(
        daemon.forks_with(&json!({"template": "null", "names": ["web-1"]})).len(),
        1,
        "the name is free again"
    );
}
