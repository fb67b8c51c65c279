//! Processes that are killed: the API says so, the rest goes on, nothing is left.

use std::{thread, time::Duration};

use forkling_daemon::api::types::{ForkState, TemplateState};
use forkling_tests::{
    daemon::{Daemon, Settings},
    eventually, proc, spec,
};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(10);

#[test]
fn a_killed_fork_is_reported_and_the_rest_live() {
    let daemon = Daemon::with_null();
    let forks = daemon.forks("null", 8);
    let victim = &forks[3];
    proc::kill(victim.pid.unwrap());
    eventually(PATIENCE, "the daemon notices", || {
        let state = daemon.inspect(&victim.id).unwrap().state;
        if state == ForkState::Died { Ok(()) } else { Err(format!("{state:?}")) }
    });
    let death = daemon.inspect(&victim.id).unwrap().death.unwrap();
    assert_eq!((death.reason.as_str(), death.signal), ("signal", Some(9)), "{death:?}");
    let error = daemon.exec(&victim.id, &json!({"argv": ["true"]})).unwrap_err();
    assert_eq!(error.code, "fork_died");
    assert!(format!("{error:?}").contains("signal 9"), "{error:?}");
    assert_eq!(daemon.snapshot(&victim.id, "of-the-dead").unwrap_err().code, "fork_died");
    let living: Vec<_> = daemon.list(false).into_iter().map(|fork| fork.pid.unwrap()).collect();
    assert_eq!(living.len(), 7);
    for pid in living {
        assert!(proc::Process::find(pid).is_some());
    }
    daemon.settle(8);
    assert_eq!(daemon.forks("null", 1).len(), 1);
}

#[test]
fn a_template_whose_zygote_was_killed_is_broken_and_can_be_reloaded() {
    let daemon = Daemon::with_null();
    let forks = daemon.forks("null", 4);
    proc::kill(daemon.zygote("null"));
    eventually(PATIENCE, "the daemon notices", || {
        let state = daemon.template("null").unwrap().state;
        if state == TemplateState::Broken { Ok(()) } else { Err(format!("{state:?}")) }
    });
    let template = daemon.template("null").unwrap();
    assert!(template.reason.unwrap().contains("killed by signal 9"));
    assert_eq!(
        (daemon.health().status.as_str(), daemon.health().broken),
        ("degraded", vec!["null".to_owned()])
    );
    let error = daemon.create(&json!({"template": "null"})).unwrap();
    let error = serde_json::to_value(&error[0]).unwrap();
    assert_eq!(error["error"]["code"], "template_broken");
    assert!(error["error"]["remediation"].as_str().unwrap().contains("reload"));
    for fork in &forks {
        assert!(proc::Process::find(fork.pid.unwrap()).is_some(), "forks outlive their zygote");
    }
    assert_eq!(daemon.reload("null").unwrap().state, TemplateState::Ready);
    assert_eq!(daemon.forks("null", 4).len(), 4);
    assert_eq!(daemon.list(false).len(), 8);
    assert_eq!(daemon.health().status, "ok");
}

#[test]
fn a_killed_daemon_takes_everything_with_it_and_the_next_starts_clean() {
    let daemon = Daemon::with_null();
    daemon.build_null("other");
    daemon.forks("other", 2);
    daemon.forks("null", 16);
    // A template that was just loaded has forks of its own for a moment.
    daemon.settle(20);
    let (time, settings) = daemon.crash();
    println!("18 forks and 2 zygotes were gone {time:?} after their daemon");
    let daemon = settings.start();
    assert!(daemon.list(true).is_empty());
    let names: Vec<_> = daemon.templates().into_iter().map(|template| template.name).collect();
    assert_eq!(names, ["null", "other"]);
    daemon.settle(0);
    assert_eq!(daemon.forks("null", 2).len(), 2);
    assert_eq!(daemon.forks("other", 2).len(), 2);
}

#[test]
fn a_daemon_killed_while_it_builds_or_forks_leaves_nothing() {
    let settings = Settings::default();
    for delay in [20, 60, 120, 250] {
        let daemon = settings.start();
        let (client, spec) =
            (daemon.client.clone(), spec::null(&format!("t{delay}"), &settings.null_guest()));
        // The connection breaks when the daemon is killed.
        let build = thread::spawn(move || {
            std::panic::catch_unwind(|| {
                client.build(&spec);
                client.forks(spec["name"].as_str().unwrap(), 100);
            })
        });
        thread::sleep(Duration::from_millis(delay));
        daemon.crash();
        let _ = build.join();
    }
    let daemon = settings.start();
    for template in daemon.templates() {
        assert_eq!(
            daemon.forks(&template.name, 1).len(),
            1,
            "{} was committed, so it is whole",
            template.name
        );
    }
    let known: Vec<_> = daemon.templates().into_iter().map(|template| template.name).collect();
    for entry in std::fs::read_dir(settings.state().join("templates")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(known.contains(&name), "{name} is left over");
    }
}
