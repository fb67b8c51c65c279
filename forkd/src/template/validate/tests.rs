use forkling_net::control::Settings;

use super::*;

fn spec(json: &str) -> BuildTemplate {
    serde_json::from_str(json).unwrap()
}

fn config() -> Config {
    Config {
        runtime_dir: PathBuf::new(),
        socket: "/tmp/x.sock".into(),
        state_dir: "/nonexistent".into(),
        vmm: "/nonexistent/vmm".into(),
        agent: "/nonexistent/agent".into(),
        kernel: "/nonexistent/kernel".into(),
        eager: false,
        copy_ahead: true,
        embryo: true,
        admission: Default::default(),
        idle_unload: None,
        trim_after: None,
        network: Settings { guests: "100.64.0.0/10".parse().unwrap(), resolvers: Vec::new() },
        taps: None,
    }
}

fn refusal(json: &str) -> Code {
    validate(&spec(json), &config()).unwrap_err().code
}

#[test]
fn every_bad_field_has_its_code() {
    assert_eq!(refusal(r#"{"name":"../x"}"#), Code::InvalidName);
    assert_eq!(refusal(r#"{"name":""}"#), Code::InvalidName);
    assert_eq!(refusal(r#"{"name":"a"}"#), Code::KernelMissing);
    assert_eq!(refusal(r#"{"name":"a","kernel":"/nonexistent"}"#), Code::FileNotFound);
    assert_eq!(refusal(r#"{"name":"a","kernel":"/"}"#), Code::FileNotFound);
    assert_eq!(refusal(r#"{"name":"a","kernel":"x"}"#), Code::InvalidRequest);
    assert_eq!(refusal(r#"{"name":"a","memory_mib":63}"#), Code::MemoryOutOfRange);
    assert_eq!(refusal(r#"{"name":"a","memory_mib":65537}"#), Code::MemoryOutOfRange);
    assert_eq!(refusal(r#"{"name":"a","vcpus":0}"#), Code::InvalidRequest);
    assert_eq!(refusal(r#"{"name":"a","vcpus":9}"#), Code::InvalidRequest);
    assert_eq!(refusal(r#"{"name":"a","warm_up":[[]]}"#), Code::InvalidRequest);
    assert_eq!(refusal(r#"{"name":"a","cmdline":"a\nb"}"#), Code::InvalidRequest);
    assert_eq!(refusal(r#"{"name":"a","env":{"A=":"x"}}"#), Code::InvalidRequest);
    assert_eq!(refusal(r#"{"name":"a","root":"etc"}"#), Code::InvalidRequest);
    assert_eq!(refusal(r#"{"name":"a","root":"/nonexistent"}"#), Code::FileNotFound);
    assert_eq!(refusal(r#"{"name":"a","payload":"null","root":"debian"}"#), Code::InvalidRequest);
    let long = format!(r#"{{"name":"a","env":{{"A":"{}"}}}}"#, "x".repeat(MAX_ENV));
    assert_eq!(refusal(&long), Code::EnvironmentTooLarge);
}

#[test]
fn modules_are_found_beside_the_kernel() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("vmlinux");
    fs::write(&kernel, "").unwrap();
    let json = format!(r#"{{"name":"a","memory_mib":64,"kernel":{kernel:?}}}"#);
    assert!(validate(&spec(&json), &config()).unwrap().modules.is_none());
    let tree = directory.path().join("modules/6.1");
    fs::create_dir_all(&tree).unwrap();
    fs::write(tree.join("modules.dep"), "").unwrap();
    assert_eq!(validate(&spec(&json), &config()).unwrap().modules, Some(tree));
}
