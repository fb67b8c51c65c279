use super::*;

fn parsed(text: &str) -> Result<BuildTemplate, Error> {
    parse(text, Path::new("template.toml"), Path::new("/base"), None)
}

#[test]
fn fills_defaults_and_makes_paths_absolute() {
    let spec = parsed("name = 'a'\nkernel = '../vmlinux'\nroot = '/r.tar'\nmodules = 'mods'").unwrap();
    assert_eq!((spec.memory_mib, spec.vcpus, spec.ready), (256, 1, Ready::Immediately));
    assert_eq!(spec.kernel.as_deref(), Some("/base/../vmlinux"));
    assert_eq!(spec.root.as_deref(), Some("/r.tar"));
    assert_eq!(spec.modules.as_deref(), Some("/base/mods"));
    assert_eq!(parsed("name = 'a'\nroot = 'debian'").unwrap().root.as_deref(), Some("debian"));
}

#[test]
fn reads_every_field() {
    let spec = parsed(
        "name = 'a'\nmemory = '1 GiB'\nvcpus = 2\ncpu = 'x86-64-v3'\ncmdline = 'quiet'\noverlay = '64M'\n\
         warm_up = ['echo hi', ['/bin/true', 'x']]\nservices = ['serve']\nready = { port = 8000 }\n\
         ready_timeout = '500 ms'\non_fork = [['/hook']]\n[env]\nA = 'b'",
    )
    .unwrap();
    assert_eq!((spec.memory_mib, spec.vcpus, spec.cpu, spec.overlay_mib), (1024, 2, Cpu::V3, 64));
    assert_eq!(spec.warm_up[0].argv(), ["/bin/sh", "-c", "echo hi"]);
    assert_eq!(spec.warm_up[1].argv(), ["/bin/true", "x"]);
    assert_eq!((spec.ready, spec.ready_timeout_ms), (Ready::Port(8000), Some(500)));
    assert_eq!(spec.env["A"], "b");
    let ready = |text: &str| parsed(&format!("name = 'a'\nready = {text}")).unwrap().ready;
    assert_eq!(ready("'forkpoint'"), Ready::Forkpoint);
    assert_eq!(ready("{ command = 'test -e /x' }"), Ready::Command(Command::Shell("test -e /x".to_owned())));
}

#[test]
fn refuses_what_it_does_not_know() {
    let refused = |text: &str| parsed(text).unwrap_err().to_string();
    assert!(refused("name = 'a'\nmemroy = 3").contains("memroy"));
    assert!(refused("memory = 3").contains("no name"));
    assert!(refused("name = 'a'\nmemory = '3 bananas'").contains("bananas"));
    assert!(refused("name = 'a'\nmemory = '99999999999 GiB'").contains("memory"));
    assert!(refused("name = 'a'\nready_timeout = '5 years'").contains("ready_timeout"));
    assert!(refused("name = 'a'\ncpu = 'z80'").contains("z80"));
    assert!(refused("name = ").contains("line 1"));
}
