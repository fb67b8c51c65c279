use super::*;
use forkling_proto::config::Root;

struct Entry {
    name: String,
    mode: u32,
    device: (u32, u32),
    data: Vec<u8>,
}

/// Reads a newc archive back, by the field offsets of the format's description.
fn parse(archive: &[u8]) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut at = 0;
    loop {
        let header = std::str::from_utf8(&archive[at..at + 110]).unwrap();
        assert_eq!(&header[..6], "070701");
        let field = |index: usize| u32::from_str_radix(&header[6 + 8 * index..14 + 8 * index], 16).unwrap();
        let (len, name_size) = (field(6) as usize, field(11) as usize);
        let name = std::str::from_utf8(&archive[at + 110..at + 110 + name_size - 1]).unwrap();
        assert_eq!(archive[at + 109 + name_size], 0);
        let data = (at + 110 + name_size).next_multiple_of(4);
        at = (data + len).next_multiple_of(4);
        if name == "TRAILER!!!" {
            assert_eq!(at, archive.len());
            return entries;
        }
        entries.push(Entry {
            name: name.to_owned(),
            mode: field(1),
            device: (field(9), field(10)),
            data: archive[data..data + len].to_vec(),
        });
    }
}

struct Input {
    directory: tempfile::TempDir,
    config: GuestConfig,
    modules: Vec<PathBuf>,
}

impl Input {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("agent"), b"\x7fELF agent").unwrap();
        let modules: Vec<PathBuf> =
            ["virtio.ko", "erofs.ko.xz"].iter().map(|name| directory.path().join(name)).collect();
        std::fs::write(&modules[0], vec![7; 100_001]).unwrap();
        std::fs::write(&modules[1], b"").unwrap();
        let config = GuestConfig {
            root: Root::Pmem,
            overlay_mib: 64,
            modules: vec!["stale".into()],
            ..Default::default()
        };
        Self { directory, config, modules }
    }

    fn write(&self) -> Result<Vec<u8>, Error> {
        let mut out = Vec::new();
        write(&mut out, &self.directory.path().join("agent"), &self.config, &self.modules)?;
        Ok(out)
    }
}

#[test]
fn holds_what_the_agent_needs() {
    let input = Input::new();
    let entries = parse(&input.write().unwrap());
    let find = |name: &str| entries.iter().find(|entry| entry.name == name).unwrap();
    assert_eq!(find("init").mode, 0o100_755);
    assert_eq!(find("init").data, b"\x7fELF agent");
    assert_eq!((find("dev/console").mode, find("dev/console").device), (0o020_600, (5, 1)));
    assert_eq!(find("proc").mode, 0o040_755);
    assert_eq!(find("modules/virtio.ko").data, vec![7; 100_001]);
    assert!(find("modules/erofs.ko.xz").data.is_empty());
    let config: GuestConfig = postcard::from_bytes(&find("forkling.config").data).unwrap();
    assert_eq!(config.modules, ["virtio.ko", "erofs.ko.xz"]);
    assert_eq!(GuestConfig { modules: input.config.modules.clone(), ..config }, input.config);
}

#[test]
fn parents_precede_children_and_bytes_repeat() {
    let input = Input::new();
    let archive = input.write().unwrap();
    assert_eq!(archive, input.write().unwrap());
    let mut seen = HashSet::new();
    for entry in parse(&archive) {
        if let Some((parent, _)) = entry.name.rsplit_once('/') {
            assert!(seen.contains(parent), "{} before {parent}", entry.name);
        }
        seen.insert(entry.name);
    }
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let mut input = Input::new();
    input.modules.push(PathBuf::from("/nonexistent/overlay.ko"));
    let error = input.write().unwrap_err();
    assert!(error.to_string().contains("/nonexistent/overlay.ko"), "{error}");
}

#[test]
fn module_names_are_unique() {
    let mut input = Input::new();
    input.modules.push(PathBuf::from("/elsewhere/virtio.ko"));
    assert!(matches!(input.write(), Err(Error::ModuleName { .. })));
    input.modules = vec![PathBuf::from("/")];
    assert!(matches!(input.write(), Err(Error::ModuleName { .. })));
}

#[test]
fn the_output_may_refuse() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let input = Input::new();
    let agent = input.directory.path().join("agent");
    assert!(matches!(write(Full, &agent, &input.config, &[]), Err(Error::Write(_))));
}
