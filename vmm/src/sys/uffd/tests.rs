use std::fs::File;
use std::os::unix::fs::FileExt;

use super::{FaultBuffer, FeatureFlags, Inserter, Scope, Uffd};
use crate::sys::memfd::SealedMemory;

const LEN: u64 = 1 << 20;

fn inserter() -> Inserter {
    Inserter::new(SealedMemory::new("test", LEN).unwrap()).map_err(|(_, error)| error).unwrap()
}

fn bytes_at(inserter: &Inserter, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let reader = File::from(inserter.memory().reader().try_clone_to_owned().unwrap());
    reader.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn exactly_the_inserted_pages_appear() {
    let inserter = inserter();
    assert_eq!(inserter.insert(65536, &[5; 65536]).unwrap(), 0);
    assert_eq!(inserter.memory().allocated_bytes().unwrap(), 65536);
    assert_eq!(bytes_at(&inserter, 65536, 65536), [5; 65536]);
}

/// A page that is there, from whatever source, ends up with the right contents.
#[test]
fn pages_that_exist_are_overwritten() {
    let inserter = inserter();
    for page in [3, 4, 9] {
        inserter.insert(page * 4096, &[1; 4096]).unwrap();
    }
    assert_eq!(inserter.insert(0, &[2; 65536]).unwrap(), 3);
    assert_eq!(bytes_at(&inserter, 0, 65536), [2; 65536]);
    assert_eq!(inserter.insert(0, &[2; 65536]).unwrap(), 16);
}

#[test]
#[should_panic(expected = "outside")]
fn insertion_past_the_end_is_refused() {
    let _ = inserter().insert(LEN - 4096, &[0; 8192]);
}

#[test]
fn the_system_call_works_without_the_device() {
    let uffd = Uffd::by_system_call(Scope::User, FeatureFlags::MISSING_SHMEM).unwrap();
    let memory = SealedMemory::new("test", LEN).unwrap();
    uffd.register_missing(memory.address_of(0, 0), LEN).unwrap();
}

#[test]
fn nothing_to_read_is_not_an_error() {
    let uffd = Uffd::new(Scope::User).unwrap();
    let mut faults = vec![];
    uffd.read_faults(&mut FaultBuffer::new(4), &mut faults).unwrap();
    assert!(faults.is_empty());
}

#[test]
fn only_a_userfaultfd_is_accepted() {
    let (reader, _writer) = std::io::pipe().unwrap();
    assert!(Uffd::from_fd(reader.into()).is_err());
    assert!(Uffd::from_fd(tempfile::tempfile().unwrap().into()).is_err());
    let uffd = Uffd::new(Scope::User).unwrap();
    assert!(Uffd::from_fd(uffd.into_fd()).is_ok());
}

/// Reading what was never written costs no memory, in the process or behind it; writing it costs the page.
#[test]
fn zeros_take_no_page() {
    use crate::memory::guest::GuestMemory;
    use vm_memory::{Bytes, GuestAddress};

    let memory = SealedMemory::new("test", LEN).unwrap();
    let view = GuestMemory::copy_on_write(memory.reader(), LEN).unwrap();
    let uffd = Uffd::new(Scope::User).unwrap();
    let base = view.mapping().address();
    uffd.register_missing(base, LEN).unwrap();
    assert_eq!(uffd.zero(base, 65536).unwrap(), 0);
    let mut bytes = [1; 65536];
    view.ram().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    assert_eq!(bytes, [0; 65536]);
    assert_eq!(memory.allocated_bytes().unwrap(), 0);
    view.ram().write_slice(&[7; 10], GuestAddress(4096)).unwrap();
    assert_eq!(memory.allocated_bytes().unwrap(), 0);
    // What was written stays; the rest of a range that is mapped in part is mapped.
    assert_eq!(uffd.zero(base, 131_072).unwrap(), 16);
    view.ram().read_slice(&mut bytes, GuestAddress(65536)).unwrap();
    assert_eq!(bytes, [0; 65536]);
    let mut written = [0; 10];
    view.ram().read_slice(&mut written, GuestAddress(4096)).unwrap();
    assert_eq!(written, [7; 10]);
    assert_eq!(memory.allocated_bytes().unwrap(), 0);
}

/// Page tables tell what was used, page by page.
#[test]
fn neighbours_of_a_page_stay_out() {
    use crate::memory::guest::GuestMemory;
    use crate::sys::pagemap::{Pagemap, Pages};
    use vm_memory::{Bytes, GuestAddress};

    let memory = SealedMemory::new("test", LEN).unwrap();
    memory.write(0, &vec![1; LEN as usize]);
    let pages = |exact: bool| {
        let view = GuestMemory::copy_on_write(memory.reader(), LEN).unwrap();
        let uffd = exact.then(|| Uffd::without_fault_around(view.mapping()).unwrap());
        for page in [3, 5, 40] {
            assert_eq!(view.ram().read_obj::<u8>(GuestAddress(page * 4096)).unwrap(), 1);
        }
        view.ram().write_obj(7_u8, GuestAddress(90 * 4096)).unwrap();
        assert_eq!(view.ram().read_obj::<u8>(GuestAddress(90 * 4096)).unwrap(), 7);
        let base = view.mapping().address();
        let find = |wanted| Pagemap::own().unwrap().find(wanted, base, LEN).unwrap();
        let numbers = |ranges: Vec<std::ops::Range<u64>>| -> Vec<u64> {
            let pages = ranges.into_iter().flat_map(|range| (range.start..range.end).step_by(4096));
            pages.map(|address| (address - base) / 4096).collect()
        };
        let found = (numbers(find(Pages::Shared)), numbers(find(Pages::Private)));
        drop(uffd);
        found
    };
    assert_eq!(pages(true), (vec![3, 5, 40], vec![90]));
    assert!(pages(false).0.len() > 3, "otherwise the kernel brings in more than was touched");
}
