//! Snapshots that were damaged, are of another version, or were made on another CPU: refused by name, nothing started.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use forkling_daemon::api::types::{ForkResult, TemplateState};
use forkling_fixtures::null_guest;
use forkling_tests::{daemon::Settings, eventually, proc, spec};
use serde_json::{Value, json};

/// A built template and a copy of its snapshot as it should be.
struct Patient {
    settings: Settings,
    healthy: PathBuf,
}

impl Patient {
    fn new() -> Self {
        let settings = Settings::default();
        // Memory that does not compress, so that chunk files have something to lose.
        let mut noise = vec![0; 200 << 10];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        fs::write(settings.null_guest(), [null_guest::PROGRAM, &noise].concat()).unwrap();
        let daemon = settings.start();
        daemon.build(&spec::null("patient", &settings.null_guest())).outcome.unwrap();
        drop(daemon);
        let healthy = settings.path().join("healthy");
        copy(&settings.snapshot("patient"), &healthy);
        Self { settings, healthy }
    }

    /// Does `damage` to the snapshot and asks for a fork; what the daemon says.
    fn with(&self, what: &str, args: &[&str], damage: &dyn Fn(&Path)) -> String {
        let snapshot = self.settings.snapshot("patient");
        fs::remove_dir_all(&snapshot).unwrap();
        copy(&self.healthy, &snapshot);
        damage(&snapshot);
        let settings = args.iter().fold(self.settings.clone(), |settings, arg| settings.arg(*arg));
        let daemon = settings.start();
        let request = json!({"template": "patient", "count": 2});
        let mut results = daemon.create(&request).unwrap();
        if what.starts_with("chunk") && args.is_empty() {
            // Forks that do not touch the chunk may run; the damage is found when the rest is loaded.
            eventually(Duration::from_secs(10), "the damage is found", || {
                let state = daemon.template("patient").unwrap().state;
                if state == TemplateState::Broken { Ok(()) } else { Err(format!("{what}: {state:?}")) }
            });
            daemon.kill_all();
            results = daemon.create(&request).unwrap();
        }
        let mut said = String::new();
        for result in results {
            let ForkResult::Error(error) = result else {
                panic!("{what} {args:?}: a fork of it runs: {result:?}")
            };
            assert_eq!(error.code, "snapshot_invalid", "{what} {args:?}: {error:?}");
            assert!(!error.retryable && !error.remediation.is_empty());
            said = format!("{}: {}", error.message, error.cause.unwrap_or_default());
        }
        let template = daemon.template("patient").unwrap();
        assert_eq!(template.state, TemplateState::Broken, "{what} {args:?}");
        assert!(template.reason.is_some());
        println!("{what} {args:?}: {said}");
        assert!(daemon.list(false).is_empty());
        daemon.remove_template("patient").unwrap();
        daemon.settle(0);
        drop(daemon);
        self.put_back();
        said
    }

    fn put_back(&self) {
        let snapshot = self.settings.snapshot("patient");
        fs::create_dir_all(snapshot.parent().unwrap()).unwrap();
        copy(&self.healthy, &snapshot);
        fs::copy(self.settings.path().join("template.json"), snapshot.with_file_name("template.json"))
            .unwrap();
    }
}

fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("-a").args([from, to]).status().unwrap();
    assert!(status.success());
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

fn truncate(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
}

/// The largest chunk file: one with the program's noise.
fn chunk(snapshot: &Path) -> PathBuf {
    let files = proc::files(&snapshot.join("chunks"));
    files.into_iter().max_by_key(|(_, len)| *len).expect("there are chunks").0
}

/// The chunk file of the smallest length: page tables and the like.
fn first_touched_chunk(snapshot: &Path) -> PathBuf {
    let files = proc::files(&snapshot.join("chunks"));
    files.into_iter().min_by_key(|(_, len)| *len).expect("there are chunks").0
}

fn edit(path: &Path, change: &dyn Fn(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, serde_json::to_vec_pretty(&value).unwrap()).unwrap();
}

/// Makes the checksums right again, as a forger would.
fn seal(snapshot: &Path) {
    let state = fs::read(snapshot.join("state.json")).unwrap();
    edit(&snapshot.join("manifest.json"), &|manifest| {
        manifest["state"] = json!({"length": state.len(), "blake3": blake3::hash(&state).to_hex().as_str()});
    });
    seal_manifest(snapshot);
}

fn seal_manifest(snapshot: &Path) {
    let sum = blake3::hash(&fs::read(snapshot.join("manifest.json")).unwrap());
    fs::write(snapshot.join("manifest.b3"), format!("{}  manifest.json\n", sum.to_hex())).unwrap();
}

/// Gives every vCPU a CPUID bit that KVM offers nowhere: direct cache access, leaf 1, ECX bit 18.
fn foreign_feature(snapshot: &Path) {
    edit(&snapshot.join("state.json"), &|state| {
        let text = state.to_string();
        let leaf = text.split('"').find(|word| word.starts_with("00000001.0/")).expect("leaf 1").to_owned();
        let mut registers: Vec<String> = leaf.split(' ').map(str::to_owned).collect();
        let ecx = u32::from_str_radix(&registers[3], 16).unwrap() | 1 << 18;
        registers[3] = format!("{ecx:08x}");
        *state = serde_json::from_str(&text.replace(&leaf, &registers.join(" "))).unwrap();
    });
    seal(snapshot);
}

/// Another vendor in leaf 0.
fn foreign_vendor(snapshot: &Path) {
    edit(&snapshot.join("state.json"), &|state| {
        let text = state.to_string();
        let leaf = text.split('"').find(|word| word.starts_with("00000000.0/")).expect("leaf 0").to_owned();
        let mut registers: Vec<String> = leaf.split(' ').map(str::to_owned).collect();
        // "CentaurHauls", in the order EBX, ECX, EDX of the text.
        registers[2..5].clone_from_slice(&[
            "746e6543".to_owned(),
            "736c7561".to_owned(),
            "48727561".to_owned(),
        ]);
        *state = serde_json::from_str(&text.replace(&leaf, &registers.join(" "))).unwrap();
    });
    seal(snapshot);
}

#[test]
fn damaged_and_foreign_snapshots_are_refused() {
    let patient = Patient::new();
    fs::copy(
        patient.settings.snapshot("patient").with_file_name("template.json"),
        patient.settings.path().join("template.json"),
    )
    .unwrap();
    type Case<'a> = (&'a str, &'a str, &'a dyn Fn(&Path));
    let cases: &[Case] = &[
        ("chunk cut short", "damaged", &|snapshot| truncate(&first_touched_chunk(snapshot))),
        ("chunk with a flipped bit", "damaged", &|snapshot| flip(&chunk(snapshot), 60_000)),
        ("chunk missing", "has no", &|snapshot| fs::remove_file(chunk(snapshot)).unwrap()),
        ("state cut short", "state.json is damaged", &|snapshot| truncate(&snapshot.join("state.json"))),
        ("state with a flipped bit", "state.json is damaged", &|snapshot| {
            flip(&snapshot.join("state.json"), 100)
        }),
        ("index with a flipped bit", "image.idx is damaged", &|snapshot| {
            flip(&snapshot.join("image.idx"), 40)
        }),
        ("index missing", "has no image.idx", &|snapshot| {
            fs::remove_file(snapshot.join("image.idx")).unwrap()
        }),
        ("manifest with a flipped bit", "manifest.json", &|snapshot| {
            flip(&snapshot.join("manifest.json"), 30)
        }),
        ("manifest missing", "has no manifest.json", &|snapshot| {
            fs::remove_file(snapshot.join("manifest.json")).unwrap();
        }),
        ("another format", "has format 99", &|snapshot| {
            edit(&snapshot.join("manifest.json"), &|manifest| manifest["format"] = json!(99));
            seal_manifest(snapshot);
        }),
        ("impossible numbers", "memory_bytes", &|snapshot| {
            edit(&snapshot.join("manifest.json"), &|manifest| manifest["memory_bytes"] = json!(u64::MAX));
            seal_manifest(snapshot);
        }),
        ("a CPU feature this host lacks", "lacks CPU features", &foreign_feature),
        ("another vendor's CPU", "CentaurHauls", &foreign_vendor),
    ];
    for (what, expected, damage) in cases {
        for args in [&[][..], &["--eager"]] {
            let said = patient.with(what, args, damage);
            assert!(said.contains(expected), "{what} {args:?}: {said:?} does not say {expected:?}");
        }
    }
    let daemon = patient.settings.start();
    assert_eq!(daemon.forks("patient", 2).len(), 2, "the undamaged snapshot is as good as before");
}
