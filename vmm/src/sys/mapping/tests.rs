//! What a forked process finds in its page tables.

use std::ops::Range;

use rustix::process::{Pid, Signal, WaitOptions};

use super::{Mapping, PAGE};
use crate::sys::{
    memfd::SealedMemory,
    pagemap::{Pagemap, Pages},
};

const LEN: usize = 64 * PAGE;

/// Pages of `mapping`, by number, that are in the page tables of a process forked from this one.
fn inherited(mapping: &Mapping, wanted: Pages) -> Vec<u64> {
    // SAFETY: the child makes no call but pause(2), which needs nothing that another thread may hold.
    let child = unsafe { libc::fork() };
    if child == 0 {
        loop {
            // SAFETY: as above.
            unsafe { libc::pause() };
        }
    }
    assert!(child > 0);
    let found = Pagemap::of(child).and_then(|pagemap| pagemap.find(wanted, mapping.address(), LEN as u64));
    let child = Pid::from_raw(child).expect("a process has a number");
    rustix::process::kill_process(child, Signal::KILL).unwrap();
    rustix::process::waitpid(Some(child), WaitOptions::empty()).unwrap();
    let pages = |range: Range<u64>| range.step_by(PAGE);
    found.unwrap().into_iter().flat_map(pages).map(|at| (at - mapping.address()) / PAGE as u64).collect()
}

#[test]
fn a_forked_process_inherits_what_is_mapped_and_no_copy() {
    let memory = SealedMemory::new("test", LEN as u64).unwrap();
    memory.write(0, &[1; LEN]);
    let mapping = Mapping::copy_on_write(memory.reader(), LEN).unwrap();
    mapping.populate(40 * PAGE as u64, PAGE as u64).unwrap();
    assert!(inherited(&mapping, Pages::Shared).is_empty(), "the kernel leaves a file's pages to faults");
    mapping.inherit_page_tables(0).unwrap();
    assert!(inherited(&mapping, Pages::Shared).contains(&40));
    assert!(inherited(&mapping, Pages::Private).is_empty());
}
