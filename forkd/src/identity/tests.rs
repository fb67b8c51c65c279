use std::collections::HashSet;

use forkling_proto::mailbox;

use super::*;

#[test]
fn identities_differ_in_everything_that_counts() {
    let (mut ids, mut machines, mut nonces) = (HashSet::new(), HashSet::new(), HashSet::new());
    for generation in 0..1000 {
        let identity = Identity::new(&Choice::default(), generation);
        assert!(crate::names::validate(&identity.id).is_ok());
        assert_eq!(identity.hostname, identity.id);
        assert!(
            ids.insert(identity.id) && machines.insert(identity.machine_id) && nonces.insert(identity.nonce)
        );
    }
}

#[test]
fn mailbox_carries_the_choice_and_fresh_entropy() {
    let choice = Choice {
        hostname: Some("worker".to_owned()),
        env: vec![("A".to_owned(), "b".to_owned())],
        param: 9,
        ..Choice::default()
    };
    let identity = Identity::new(&choice, 5);
    let (first, payload) = mailbox::decode(&identity.mailbox().unwrap()).unwrap();
    let (second, _) = mailbox::decode(&identity.mailbox().unwrap()).unwrap();
    assert_eq!((first.generation, first.param, first.nonce), (5, 9, identity.nonce));
    assert_eq!((payload.hostname.as_str(), payload.env.len()), ("worker", 1));
    assert_eq!(payload.machine_id.len(), 32);
    assert_ne!(first.entropy, second.entropy);
}

#[test]
fn renewal_keeps_the_fork_and_changes_the_activation() {
    let identity = Identity::new(&Choice::default(), 1);
    let renewed = identity.renewed(2);
    assert_eq!((&renewed.id, &renewed.machine_id), (&identity.id, &identity.machine_id));
    assert_eq!(renewed.generation, 2);
    assert_ne!(renewed.nonce, identity.nonce);
}

#[test]
fn base32_is_pinned() {
    assert_eq!(base32([0; 8]), "aaaaaaaaaaaaa");
    assert_eq!(base32([0xff; 8]), "777777777777p");
    assert_eq!(base32(33u64.to_le_bytes()), "bbaaaaaaaaaaa");
}

fn scratch(name: &str) -> std::path::PathBuf {
    let path = std::env::temp_dir().join(format!("forkling-identity-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    path
}

#[test]
fn generations_never_repeat_over_restarts() {
    let directory = scratch("restart");
    let path = directory.join("generation");
    let mut last = 0;
    for _ in 0..3 {
        let generations = Generations::open(&path).unwrap();
        for _ in 0..100 {
            let next = generations.next().unwrap();
            assert!(next > last);
            last = next;
        }
    }
    // A damaged mark starts at the clock, not at the beginning.
    std::fs::write(&path, "nonsense").unwrap();
    assert!(Generations::open(&path).unwrap().next().unwrap() > 1 << 40);
    std::fs::remove_dir_all(directory).unwrap();
}

#[test]
fn generations_go_on_beyond_one_block() {
    let directory = scratch("block");
    let generations = Generations::open(&directory.join("generation")).unwrap();
    let mut last = 0;
    for _ in 0..(3u64 << 20) {
        // The disk may be behind for a moment; it must catch up.
        let next = (0..1000).find_map(|_| {
            generations.next().or_else(|| {
                std::thread::sleep(std::time::Duration::from_millis(10));
                None
            })
        });
        let next = next.expect("the mark moves on");
        assert!(next > last);
        last = next;
    }
    // The last promise may still be on its way to the disk, and make its file anew.
    let removed = (0..1000).any(|_| {
        std::fs::remove_dir_all(&directory).is_ok() || {
            std::thread::sleep(std::time::Duration::from_millis(10));
            false
        }
    });
    assert!(removed);
}
