use vm_memory::{Bytes, GuestAddress};

use super::{Process, from_smaps, private_bytes, scan};
use crate::memory::guest::GuestMemory;
use crate::memory::image::{CHUNK, Contents, Image};

const LEN: u64 = 64 << 20;

/// A view of an image with its first chunk filled.
fn view() -> (Image, GuestMemory) {
    let image = Image::eager(LEN).unwrap();
    image.claim(0);
    image.insert(0, Contents::Data(&[1; CHUNK])).unwrap();
    let memory = GuestMemory::copy_on_write(image.reader(), LEN).unwrap();
    (image, memory)
}

#[test]
fn pages_written_are_private_and_pages_read_are_not() {
    let (_image, memory) = view();
    let own = || private_bytes(Process::Own, memory.mapping().address(), LEN).unwrap();
    assert_eq!(own(), 0);
    let mut bytes = vec![0; 4 * CHUNK];
    memory.ram().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    assert_eq!(own(), 0);
    for page in [0, 1, 2, 100, 5000] {
        memory.ram().write_slice(&[7], GuestAddress(page * 4096)).unwrap();
    }
    assert_eq!(own(), 5 * 4096);
    let other = private_bytes(Process::Other(std::process::id()), memory.mapping().address(), LEN);
    assert_eq!(other.unwrap(), 5 * 4096);
}

/// More regions than one call returns.
#[test]
fn scattered_pages_are_all_counted_either_way() {
    let (_image, memory) = view();
    for page in (0..4000).step_by(2) {
        memory.ram().write_slice(&[7], GuestAddress(page * 4096)).unwrap();
    }
    let (address, pagemap) = (memory.mapping().address(), Process::Own.open("pagemap").unwrap());
    match scan(&pagemap, address, LEN) {
        // Before Linux 6.7.
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOTTY)),
        Ok(bytes) => assert_eq!(bytes, 2000 * 4096),
    }
    assert_eq!(from_smaps(Process::Own, address, LEN).unwrap(), 2000 * 4096);
}

#[test]
fn a_process_that_is_gone_is_an_error() {
    assert!(private_bytes(Process::Other(u32::MAX), 0, 4096).is_err());
}
