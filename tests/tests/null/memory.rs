//! The daemon says where the memory of a fork is, to the page.

use forkling_daemon::api::types::ForkMemory;
use forkling_tests::{daemon::Daemon, proc, spec::NULL_MIB};
use serde_json::json;

const PAGE: u64 = 4096;
const PAGES: u64 = 700;

fn memory(daemon: &Daemon, id: &str) -> ForkMemory {
    daemon.call("GET", &format!("/v1/forks/{id}/memory"), None).unwrap_or_else(|error| panic!("{error:?}"))
}

#[test]
fn a_fork_has_the_pages_that_it_wrote() {
    let daemon = Daemon::with_null();
    daemon.fork("null");
    daemon.wait_complete("null");
    let fork = |param| daemon.forks_with(&json!({"template": "null", "param": param})).pop().unwrap();
    let (idle, busy) = (fork(0), fork(PAGES));
    let (none, some) = (memory(&daemon, &idle.id), memory(&daemon, &busy.id));
    assert_eq!(some.private_bytes - none.private_bytes, PAGES * PAGE, "{none:?} {some:?}");
    for (fork, memory) in [(&idle, none), (&busy, some)] {
        assert_eq!(memory.guest_bytes, u64::from(NULL_MIB) << 20);
        assert!(memory.shared_bytes > 0 && memory.shared_bytes < memory.guest_bytes, "{memory:?}");
        assert!(memory.vmm_private_bytes > 0 && memory.vmm_private_bytes < 8 << 20, "{memory:?}");
        let parts = memory.vmm_private_bytes + memory.page_table_bytes + memory.kernel_stack_bytes;
        assert_eq!(memory.overhead_bytes, parts);
        let held = proc::holdings(fork.pid.unwrap());
        assert_eq!((memory.threads, memory.descriptors), (held.threads as u64, held.descriptors as u64));
        assert!((1..memory.descriptors).contains(&memory.sockets), "{memory:?}");
    }
}

#[test]
fn the_dead_have_none() {
    let daemon = Daemon::with_null();
    let fork = daemon.fork("null");
    daemon.kill(&fork.id).unwrap();
    let path = format!("/v1/forks/{}/memory", fork.id);
    assert_eq!(daemon.call::<ForkMemory>("GET", &path, None).unwrap_err().code, "fork_died");
    let none = daemon.call::<ForkMemory>("GET", "/v1/forks/nobody/memory", None);
    assert_eq!(none.unwrap_err().code, "fork_not_found");
}
