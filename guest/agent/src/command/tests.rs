use super::*;
use std::fs;
use std::os::unix::fs::PermissionsExt;

fn words(list: &[&str]) -> Vec<String> {
    list.iter().map(|word| (*word).to_owned()).collect()
}

#[test]
fn the_template_overrides_the_defaults() {
    let environment =
        base_environment(&[("PATH".into(), "/opt/bin".into()), ("LANG".into(), "C.UTF-8".into())]);
    assert_eq!(environment["PATH"], "/opt/bin");
    assert_eq!(environment["LANG"], "C.UTF-8");
    assert_eq!(environment["HOME"], "/root");
}

#[test]
fn programs_are_looked_up_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, mode| {
        let path = directory.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    };
    file("a/tool", 0o644);
    let second = file("b/tool", 0o755);
    file("c/tool", 0o755);
    fs::create_dir(directory.path().join("a/subdirectory")).unwrap();
    let root = directory.path().to_str().unwrap();
    let path = format!("{root}/missing:{root}/a:{root}/b:{root}/c");
    assert_eq!(find_program("tool", "/", &path), Some(second.clone()));
    assert_eq!(find_program("subdirectory", "/", &path), None);
    assert_eq!(find_program("nothing", "/", &path), None);
    assert_eq!(find_program("b/tool", root, ""), Some(second.clone()));
    assert_eq!(find_program(second.to_str().unwrap(), "/", ""), Some(second));
}

#[test]
fn what_the_kernel_would_misread_is_refused() {
    let base = Environment::new();
    let refuse = |argv: &[&str], env: &[(String, String)], cwd: Option<&str>| {
        let argv = words(argv);
        check(Request { argv: &argv, base: &base, env, cwd, user: None }).is_err()
    };
    assert!(refuse(&[], &[], None));
    assert!(refuse(&[""], &[], None));
    assert!(refuse(&["a\0b"], &[], None));
    assert!(refuse(&["true"], &[], Some("/\0")));
    assert!(refuse(&["true"], &[("".into(), "x".into())], None));
    assert!(refuse(&["true"], &[("A=B".into(), "x".into())], None));
    assert!(refuse(&["true"], &[("A".into(), "x\0".into())], None));
    assert!(!refuse(&["true", ""], &[("A".into(), "x=y".into())], Some("/")));
}

#[test]
fn messages_stay_short() {
    assert_eq!(line(&words(&["echo", "hi"])), "echo hi");
    let long = line(&words(&["x".repeat(150).as_str(), "ü".repeat(100).as_str()]));
    assert!(long.len() <= 203 && long.ends_with("ü..."), "{long}");
    assert_eq!(tail(b"first\nlast line \n", 11), "last line");
    assert_eq!(tail(b"", 10), "");
    assert_eq!(tail(&[0xff, b'a'], 10), "\u{fffd}a");
}
