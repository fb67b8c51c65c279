use vm_memory::{Bytes, GuestAddress};

use super::{Pagemap, Pages, read, scan, total};
use crate::memory::guest::GuestMemory;
use crate::memory::image::{CHUNK, Image};
use crate::sys::mapping::LARGE_PAGE;

const LEN: u64 = 64 << 20;

/// A view of an image with its first chunk filled.
fn view() -> (Image, GuestMemory) {
    let image = Image::eager(LEN).unwrap();
    image.claim(0);
    image.insert(0, &[1; CHUNK]).unwrap();
    let memory = GuestMemory::copy_on_write(image.reader(), LEN).unwrap();
    (image, memory)
}

#[test]
fn pages_written_are_private_and_pages_read_are_shared() {
    let (_image, memory) = view();
    let start = memory.mapping().address();
    let count = |wanted| total(&Pagemap::own().unwrap().find(wanted, start, LEN).unwrap());
    assert_eq!((count(Pages::Private), count(Pages::Shared)), (0, 0));
    let mut bytes = vec![0; CHUNK];
    memory.ram().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    assert_eq!(count(Pages::Private), 0);
    assert!(count(Pages::Shared) >= CHUNK as u64);
    for page in [0, 1, 2, 100, 5000] {
        memory.ram().write_slice(&[7], GuestAddress(page * 4096)).unwrap();
    }
    let pid = i32::try_from(std::process::id()).unwrap();
    let private = Pagemap::of(pid).unwrap().find(Pages::Private, start, LEN).unwrap();
    let expected = [0..3, 100..101, 5000..5001].map(|r| start + r.start * 4096..start + r.end * 4096);
    assert_eq!(private, expected);
}

#[test]
fn large_pages_are_the_images_until_they_are_written() {
    let (_image, memory) = view();
    assert_eq!(memory.worth_enlarging(&[(0, 512)], &[]), [0]);
    memory.enlarge(0);
    let mut bytes = vec![0; LARGE_PAGE as usize];
    memory.ram().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    assert!(bytes[..CHUNK].iter().all(|&byte| byte == 1) && bytes[CHUNK..].iter().all(|&byte| byte == 0));
    assert!(memory.private().unwrap().is_empty());
    assert_eq!(total(&memory.shared().unwrap()), LARGE_PAGE);
    memory.ram().write_slice(&[7], GuestAddress(3 * 4096)).unwrap();
    assert_eq!(memory.private().unwrap(), vec![3 * 4096..4 * 4096; 1]);
    memory.ram().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    assert_eq!((bytes[3 * 4096 - 1], bytes[3 * 4096], bytes[3 * 4096 + 1]), (1, 7, 1));
}

/// More regions than one call returns.
#[test]
fn scattered_pages_are_all_found_either_way() {
    let (_image, memory) = view();
    for page in (0..4000).step_by(2) {
        memory.ram().write_slice(&[7], GuestAddress(page * 4096)).unwrap();
    }
    let (address, pagemap) = (memory.mapping().address(), Pagemap::own().unwrap());
    let by_entry = read(&pagemap.0, Pages::Private, address, LEN).unwrap();
    assert_eq!(by_entry.len(), 2000);
    match scan(&pagemap.0, Pages::Private, address, LEN) {
        // Before Linux 6.7.
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOTTY)),
        Ok(found) => assert_eq!(found, by_entry),
    }
}

#[test]
fn a_process_that_is_gone_is_an_error() {
    assert!(Pagemap::of(i32::MAX).is_err());
}
