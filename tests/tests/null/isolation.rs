//! What forks write is theirs alone: not the template's, not a sibling's, not a later fork's.

use forkling_daemon::api::types::ForkInfo;
use forkling_fixtures::null_guest::WRITE_AREA;
use forkling_tests::{
    daemon::Daemon,
    image::{Image, checksum_on_disk},
};
use serde_json::json;

/// Pages that each fork writes.
const PAGES: u64 = 500;
const PAGE: u64 = 4096;

fn word(image: &Image, address: u64) -> u64 {
    let mut bytes = [0; 8];
    image.private(address, &mut bytes);
    u64::from_le_bytes(bytes)
}

/// Every page that the fork wrote, as its own process sees it, holds its generation; the page after them is untouched.
fn sees_only_itself(fork: &ForkInfo) {
    let image = Image::of(fork.pid.unwrap());
    for page in 0..PAGES {
        assert_eq!(word(&image, WRITE_AREA + page * PAGE), fork.generation, "page {page} of {}", fork.id);
    }
    assert_eq!(word(&image, WRITE_AREA + PAGES * PAGE), 0, "{}", fork.id);
}

#[test]
fn two_hundred_forks_that_write_leave_the_image_as_it_was() {
    let daemon = Daemon::with_null();
    // The first fork sets off the loading of the rest.
    daemon.fork("null");
    daemon.wait_complete("null");
    let template = Image::of(daemon.zygote("null"));
    let before = template.checksum();
    assert_eq!(before, checksum_on_disk(&daemon.settings.snapshot("null")));
    let request = json!({"template": "null", "count": 50, "param": PAGES});
    for _ in 0..4 {
        let forks = daemon.forks_with(&request);
        for fork in &forks {
            sees_only_itself(fork);
        }
        assert_eq!(template.checksum(), before, "while the forks live");
        daemon.kill_all();
    }
    assert_eq!(template.checksum(), before, "after 200 forks");
    let later = daemon.fork("null");
    let image = Image::of(later.pid.unwrap());
    for page in 0..PAGES {
        assert_eq!(
            word(&image, WRITE_AREA + page * PAGE),
            0,
            "a later fork sees page {page} of an earlier one"
        );
    }
}

#[test]
fn a_fork_cannot_reach_the_image_by_its_descriptors() {
    let daemon = Daemon::with_null();
    let fork = daemon.fork("null");
    let pid = fork.pid.unwrap();
    for process in [pid, daemon.zygote("null")] {
        for (descriptor, target) in forkling_tests::proc::descriptors(process) {
            if !target.to_string_lossy().starts_with("/memfd:") {
                continue;
            }
            let number = descriptor.file_name().unwrap().to_string_lossy().into_owned();
            let info = std::fs::read_to_string(format!("/proc/{process}/fdinfo/{number}")).unwrap();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
            let access = u32::from_str_radix(flags, 8).unwrap() & 3;
            assert_eq!(access, 0, "{target:?} is open for writing in process {process}: {info}");
        }
        let shared = forkling_tests::proc::mappings(process).into_iter().find(|line| {
            line.contains("/memfd:")
                && line.split(' ').nth(1).is_some_and(|mode| mode.ends_with('s') && mode.contains('w'))
        });
        assert_eq!(shared, None, "a shared writable mapping in process {process}");
    }
}

#[test]
fn a_template_made_of_a_fork_has_what_the_fork_wrote() {
    let daemon = Daemon::with_null();
    let parent = daemon.forks_with(&json!({"template": "null", "param": PAGES})).pop().unwrap();
    let template = daemon.snapshot(&parent.id, "second").unwrap();
    assert_eq!(template.parent.unwrap().fork, parent.id);
    let again = daemon.inspect(&parent.id).unwrap();
    assert!(again.generation > parent.generation, "the parent goes on as a new generation");
    let (_, settings) = daemon.stop();
    let daemon = settings.start();
    let forks = daemon.forks_with(&json!({"template": "second", "count": 4, "param": 1}));
    // Until then a page that is missing cannot be read from outside.
    daemon.wait_complete("second");
    for fork in forks {
        let image = Image::of(fork.pid.unwrap());
        assert_eq!(word(&image, WRITE_AREA), fork.generation);
        for page in 1..PAGES {
            assert_eq!(word(&image, WRITE_AREA + page * PAGE), parent.generation, "page {page}");
        }
    }
}
