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
fn trimming_gives_back_what_is_equal_and_nothing_else() {
    let image = image();
    let memory = GuestMemory::copy_on_write(image.as_fd(), PAGES * PAGE).unwrap();
    // Equal are 3, 4, 8 and 20; of 5 only one byte is another.
    for (page, now) in [(3, 3), (4, 4), (5, 5), (6, 99), (7, 7), (8, 8), (20, 20), (40, 1)] {
        write(&memory, page, now);
    }
    memory.write_image(5 * PAGE + 4095, &[6]).unwrap();
    let pages = memory.private().unwrap();
    // What is written after the pages were found counts all the same.
    write(&memory, 7, 70);
    assert_eq!(private(&memory), [3..9, 20..21, 40..41]);
    assert_eq!(memory.trim(&pages, &image).unwrap(), 4 * PAGE);
    assert_eq!(private(&memory), [5..8, 40..41]);
    for (page, now) in [(3, 3), (4, 4), (6, 99), (7, 70), (8, 8), (20, 20), (40, 1), (41, 41)] {
        assert_eq!(value(&memory, page), now);
    }
    assert_eq!(memory.trim(&memory.private().unwrap(), &image).unwrap(), 0);
    // A page given back is copied again at the next write, and the image stays as it is.
    write(&memory, 20, 21);
    assert_eq!(value(&memory, 20), 21);
    let mut bytes = [0; PAGE as usize];
    image.read_exact_at(&mut bytes, 20 * PAGE).unwrap();
    assert_eq!(bytes, [20; PAGE as usize]);
}
