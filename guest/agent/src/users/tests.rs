use super::*;

const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/bash
# a comment
broken:x:notanumber:1::/:
agent:x:1000:1001:,,,:/home/agent:/bin/sh
1000x:x:7:7::/:
nohome:x:8:9::
";
const GROUP: &str =
    "root:x:0:\nagent:x:1001:\nvideo:x:44:root,agent\nkvm:x:105:agent\nbad:x:z:agent\nshort:x:9\n";

#[test]
fn by_name_with_all_groups() {
    let user = find("agent", PASSWD, GROUP).unwrap();
    assert_eq!((user.uid, user.gid, user.home.as_str()), (1000, 1001, "/home/agent"));
    assert_eq!(user.groups, [44, 105, 1001]);
}

#[test]
fn by_number() {
    assert_eq!(find("1000", PASSWD, GROUP), find("agent", PASSWD, GROUP));
    let unknown = find("4242", PASSWD, GROUP).unwrap();
    assert_eq!((unknown.uid, unknown.gid, unknown.home.as_str()), (4242, 4242, "/"));
}

#[test]
fn a_name_goes_before_a_number() {
    assert_eq!(find("1000x", PASSWD, GROUP).unwrap().uid, 7);
}

#[test]
fn nobody() {
    for name in ["nosuch", "", "-1", "+5", "4294967295", "99999999999", "broken", "# a comment", "1e3"] {
        assert_eq!(find(name, PASSWD, GROUP), None, "{name:?}");
    }
}

#[test]
fn an_empty_home_is_the_root() {
    assert_eq!(find("nohome", PASSWD, GROUP).unwrap().home, "/");
}

#[test]
fn missing_files_are_empty() {
    let etc = tempfile::tempdir().unwrap();
    assert_eq!(lookup("root", etc.path()).unwrap(), None);
    assert_eq!(lookup("0", etc.path()).unwrap().unwrap().uid, 0);
}
