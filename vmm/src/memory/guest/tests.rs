use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;

use rustix::fs::{MemfdFlags, memfd_create};

use super::*;
use crate::memory::layout::PAGE;

const PAGES: u64 = 64;

/// An image whose page `n` is full of `n`.
fn image() -> File {
    let mut image = File::from(memfd_create("image", MemfdFlags::CLOEXEC).unwrap());
    (0..PAGES).for_each(|page| image.write_all(&[page as u8; PAGE as usize]).unwrap());
    image
}

fn private(memory: &GuestMemory) -> Vec<Range<u64>> {
    let pages = memory.private().unwrap().into_iter();
    pages.map(|range| range.start / PAGE..range.end / PAGE).collect()
}

fn write(memory: &GuestMemory, page: u64, value: u8) {
    memory.write_image(page * PAGE, &[value; PAGE as usize]).unwrap();
}

fn value(memory: &GuestMemory, page: u64) -> u8 {
    let mut bytes = [0; PAGE as usize];
    memory.read_image(page * PAGE, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == bytes[0]));
    bytes[0]
}

#[test]
fn trimming_gives_back_what_is_equal_or_nearly_so_and_nothing_else() {
    let image = image();
    let memory = GuestMemory::copy_on_write(image.as_fd(), PAGES * PAGE).unwrap();
    // Equal are 3, 4, 8 and 20; of 5 only one byte is another, of 9 half.
    for (page, now) in [(3, 3), (4, 4), (5, 5), (6, 99), (7, 7), (8, 8), (9, 9), (20, 20), (40, 1)] {
        write(&memory, page, now);
    }
    memory.write_image(5 * PAGE + 4095, &[6]).unwrap();
    memory.write_image(9 * PAGE, &[10; PAGE as usize / 2]).unwrap();
    let pages = memory.private().unwrap();
    // What is written after the pages were found counts all the same.
    write(&memory, 7, 70);
    assert_eq!(private(&memory), [3..10, 20..21, 40..41]);
    let Trimmed { equal, folded } = memory.trim(&pages, &image).unwrap();
    assert_eq!(equal, 4 * PAGE);
    assert_eq!(private(&memory), [6..8, 9..10, 40..41]);
    let folded = folded.expect("this process may have a userfaultfd");
    assert_eq!(folded.len(), 1);
    folded.unfold().unwrap();
    assert_eq!(private(&memory), [5..8, 9..10, 40..41]);
    for (page, now) in [(3, 3), (4, 4), (6, 99), (7, 70), (8, 8), (20, 20), (40, 1), (41, 41)] {
        assert_eq!(value(&memory, page), now);
    }
    let mut bytes = [0; PAGE as usize];
    memory.read_image(5 * PAGE, &mut bytes).unwrap();
    assert_eq!((&bytes[..4095], bytes[4095]), (&[5; 4095][..], 6));
    // A page given back is copied again at the next write, and the image stays as it is.
    write(&memory, 20, 21);
    assert_eq!(value(&memory, 20), 21);
    image.read_exact_at(&mut bytes, 20 * PAGE).unwrap();
    assert_eq!(bytes, [20; PAGE as usize]);
}

/// Without anything to keep, nobody has to serve anything.
#[test]
fn memory_without_nearly_equal_pages_is_left_to_the_kernel() {
    let image = image();
    let memory = GuestMemory::copy_on_write(image.as_fd(), PAGES * PAGE).unwrap();
    assert!(memory.trim(&[], &image).unwrap().folded.is_none());
    write(&memory, 20, 20);
    write(&memory, 21, 99);
    let Trimmed { equal, folded } = memory.trim(&memory.private().unwrap(), &image).unwrap();
    assert!((equal, folded.is_none()) == (PAGE, true));
    assert_eq!(value(&memory, 22), 22);
}
