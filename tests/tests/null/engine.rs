//! The engine without its daemon: a null guest is built, forked, and every fork answers.

use forkling_fixtures::engine::{Zygote, build_null};
use forkling_proto::mailbox::Header;
use forkling_tests::vmm_program;

#[test]
fn forks_of_a_null_guest_answer() {
    let directory = tempfile::tempdir().unwrap();
    build_null(&vmm_program(), 64, directory.path()).unwrap();
    let mut zygote = Zygote::load(&vmm_program(), directory.path()).unwrap();
    let forks: Vec<_> = (1..=16).map(|nonce| (nonce, zygote.park().unwrap())).collect();
    for (nonce, fork) in &forks {
        let header = Header {
            generation: 100 + nonce,
            nonce: *nonce,
            param: 10,
            wall_clock_ns: 1,
            entropy: [0; 64],
            prepare: false,
        };
        let stamps = fork.activate(&header).unwrap();
        assert!(stamps.acknowledged > stamps.entered && stamps.entered > stamps.activated);
    }
}
