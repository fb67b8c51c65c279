use super::super::{Digest, Error, FileSum};
use super::{FORMAT, Forkpoint, HostTags, ImageSummary, Manifest};
use crate::protocol::{CpuTemplate, Payload};

fn sum(length: u64) -> FileSum {
    FileSum { length, blake3: Digest([0x5A; 32]) }
}

pub(crate) fn sample() -> Manifest {
    Manifest {
        format: FORMAT,
        tool: "forkling 0.1.0".into(),
        created: 1_790_000_000,
        host: HostTags {
            arch: "x86_64".into(),
            cpu_vendor: "AuthenticAMD".into(),
            kernel: "6.1.0".into(),
            kvm: "svm".into(),
        },
        memory_bytes: 4 << 30,
        vcpus: 2,
        cpu: CpuTemplate::X86_64V3,
        payload: Payload::Linux,
        forkpoint: Forkpoint { mailbox_pages: vec![0x1000, 0x1_0000_0000], mailbox_bytes: 8192 },
        state: sum(1000),
        root: Some(sum(1 << 20)),
        image: ImageSummary {
            chunk_bytes: 65536,
            chunks: 65536,
            data_chunks: 100,
            unique_chunks: 90,
            stored_bytes: 1 << 20,
            index: sum(16 + 32 * 90 + 8),
        },
    }
}

#[test]
fn survives_a_round_trip() {
    assert_eq!(Manifest::decode(&sample().encode()).unwrap(), sample());
    assert_eq!(Manifest::decode_format(&sample().encode()).unwrap(), FORMAT);
}

/// The text of format 3; a change needs another format number.
#[test]
fn encoding_is_pinned() {
    let text = String::from_utf8(Manifest { root: None, ..sample() }.encode()).unwrap();
    let digest = "5a".repeat(32);
    let expected = format!(
        r#"{{"format":3,"tool":"forkling0.1.0","created":1790000000,"host":{{"arch":"x86_64","cpu_vendor":"AuthenticAMD","kernel":"6.1.0","kvm":"svm"}},"memory_bytes":4294967296,"vcpus":2,"cpu":"x86-64-v3","payload":"linux","forkpoint":{{"mailbox_pages":[4096,4294967296],"mailbox_bytes":8192}},"state":{{"length":1000,"blake3":"{digest}"}},"root":null,"image":{{"chunk_bytes":65536,"chunks":65536,"data_chunks":100,"unique_chunks":90,"stored_bytes":1048576,"index":{{"length":2904,"blake3":"{digest}"}}}}}}"#
    );
    assert_eq!(text.split_whitespace().collect::<String>(), expected);
}

#[test]
fn the_format_is_readable_whatever_the_rest_is() {
    assert_eq!(Manifest::decode_format(br#"{"new":[1],"format":7,"image":null}"#).unwrap(), 7);
    assert!(matches!(Manifest::decode_format(b"{}"), Err(Error::Json { .. })));
}

#[test]
fn refuses_unknown_and_missing_fields() {
    let good = serde_json::to_value(sample()).unwrap();
    let refused = |value: &serde_json::Value| {
        let error = Manifest::decode(&serde_json::to_vec(value).unwrap()).unwrap_err();
        assert!(matches!(error, Error::Json { .. }), "{error}");
    };
    for at in ["", "/host", "/forkpoint", "/state", "/image", "/image/index"] {
        let mut value = good.clone();
        value.pointer_mut(at).unwrap()["surprise"] = 1.into();
        refused(&value);
    }
    for name in good.as_object().unwrap().keys().filter(|name| *name != "root") {
        let mut value = good.clone();
        value.as_object_mut().unwrap().remove(name);
        refused(&value);
    }
}

#[test]
fn refuses_a_digest_that_is_a_path() {
    let mut value = serde_json::to_value(sample()).unwrap();
    value["state"]["blake3"] = format!("../../{}", "0".repeat(58)).into();
    let error = Manifest::decode(&serde_json::to_vec(&value).unwrap()).unwrap_err();
    assert!(error.to_string().contains("64 lower-case hex digits"), "{error}");
}

#[test]
fn refuses_numbers_out_of_range() {
    let refused = |field: &str, change: fn(&mut Manifest)| {
        let mut manifest = sample();
        change(&mut manifest);
        match manifest.validate() {
            Err(Error::OutOfRange { field: found, .. }) => assert!(found.starts_with(field), "{found}"),
            other => panic!("{field}: {other:?}"),
        }
    };
    refused("memory_bytes", |m| m.memory_bytes = 63 << 20);
    refused("memory_bytes", |m| m.memory_bytes = 65 << 30);
    refused("memory_bytes", |m| m.memory_bytes += 4096);
    refused("vcpus", |m| m.vcpus = 0);
    refused("vcpus", |m| m.vcpus = 9);
    refused("state.length", |m| m.state.length = 1 << 40);
    refused("root.length", |m| m.root = Some(sum(0)));
    refused("image.chunks", |m| m.image.chunks -= 1);
    refused("image.chunk_bytes", |m| m.image.chunk_bytes = 4096);
    refused("image.data_chunks", |m| m.image.data_chunks = u64::MAX);
    refused("image.unique_chunks", |m| m.image.unique_chunks = 101);
    refused("image.index.length", |m| m.image.index.length = 1 << 40);
    refused("forkpoint.mailbox_pages", |m| m.forkpoint.mailbox_pages.clear());
    refused("forkpoint.mailbox_pages", |m| m.forkpoint.mailbox_pages = vec![0; 17]);
    refused("forkpoint.mailbox_pages", |m| m.forkpoint.mailbox_pages[0] = 0x1001);
    refused("forkpoint.mailbox_pages", |m| m.forkpoint.mailbox_pages[0] = 0xD000_0000);
    refused("forkpoint.mailbox_pages", |m| m.forkpoint.mailbox_pages[0] = 6 << 30);
    refused("forkpoint.mailbox_bytes", |m| m.forkpoint.mailbox_bytes = 8193);
}

#[test]
fn refuses_another_format() {
    let error = Manifest { format: 3, ..sample() }.validate().unwrap_err();
    assert!(matches!(error, Error::Format { found: 3 }), "{error}");
}
