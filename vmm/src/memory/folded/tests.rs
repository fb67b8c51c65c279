use std::{
    fs::File,
    io::Write,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::guest::{GuestMemory, Trimmed};

/// Pages of the image; the last 16 are a hole.
const PAGES: u64 = 128;

/// An image whose page `n` is full of `n`.
fn image() -> File {
    let mut image = File::from(memfd_create("image", MemfdFlags::CLOEXEC).unwrap());
    (0..PAGES - 16).for_each(|page| image.write_all(&[page as u8; PAGE as usize]).unwrap());
    image.set_len(PAGES * PAGE).unwrap();
    image
}

/// What page `n` of the image has.
fn original(page: u64) -> Vec<u8> {
    vec![if page < PAGES - 16 { page as u8 } else { 0 }; PAGE as usize]
}

/// Page `n` as a guest has changed it, or not.
fn contents(page: u64) -> Vec<u8> {
    let mut bytes = original(page);
    match page % 8 {
        // In few lines, the first and the last among them.
        1..=3 => [0, 100, 1000, 4095].into_iter().for_each(|at| bytes[at] ^= 0x5A),
        // In all.
        4 => bytes.iter_mut().for_each(|byte| *byte ^= 0xFF),
        // Read only, equal again, and never touched.
        _ => {}
    }
    bytes
}

/// A guest's memory of which much is folded.
fn trimmed(image: &File) -> (GuestMemory, Folded) {
    let memory = GuestMemory::copy_on_write(image.as_fd(), PAGES * PAGE).unwrap();
    for page in (0..PAGES).filter(|page| (1..=5).contains(&(page % 8))) {
        memory.ram().write_slice(&contents(page), GuestAddress(page * PAGE)).unwrap();
    }
    let Trimmed { equal, folded } = memory.trim(&memory.private().unwrap(), image).unwrap();
    let folded = folded.expect("pages are folded: this process may have a userfaultfd");
    assert_eq!((equal, folded.len() as u64), (PAGES / 8 * PAGE, PAGES / 8 * 3));
    (memory, folded)
}

fn page(memory: &GuestMemory, page: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE as usize];
    memory.ram().read_slice(&mut bytes, GuestAddress(page * PAGE)).unwrap();
    bytes
}

fn private(memory: &GuestMemory) -> Vec<u64> {
    memory.private().unwrap().into_iter().flat_map(|range| range.start / PAGE..range.end / PAGE).collect()
}

/// Serves faults beside `work`, for as long as that takes.
fn served<T>(mut folded: Folded, work: impl FnOnce() -> T) -> (Folded, T) {
    let done = Arc::new(AtomicBool::new(false));
    let stop = done.clone();
    let server = thread::spawn(move || {
        let moment = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
        while !stop.load(Ordering::SeqCst) {
            poll(&mut [PollFd::new(&folded.descriptor(), PollFlags::IN)], Some(&moment)).unwrap();
            folded.serve().unwrap();
        }
        folded
    });
    let result = work();
    done.store(true, Ordering::SeqCst);
    (server.join().unwrap(), result)
}

#[test]
fn a_page_that_is_touched_is_what_it_was() {
    let image = image();
    let (memory, folded) = trimmed(&image);
    assert_eq!(private(&memory), Vec::from_iter((0..PAGES).filter(|page| page % 8 == 4)));
    let (folded, ()) = served(folded, || {
        for number in [9, 8, 12, 10, 16, 66, 120, 121, 126] {
            assert_eq!(page(&memory, number), contents(number), "page {number}");
        }
        // Written at once, which keeps the rest of it.
        memory.ram().write_obj(0xABu8, GuestAddress(17 * PAGE + 8)).unwrap();
        memory.ram().write_obj(0xCDu8, GuestAddress(24 * PAGE + 8)).unwrap();
    });
    assert_eq!(folded.len() as u64, PAGES / 8 * 3 - 5);
    folded.unfold().unwrap();
    for number in 0..PAGES {
        let mut expected = contents(number);
        match number {
            17 => expected[8] = 0xAB,
            24 => expected[8] = 0xCD,
            _ => {}
        }
        assert_eq!(page(&memory, number), expected, "page {number}");
    }
    // Among what is no hole: older kernels show the page of zeros as private.
    let inside = |page: &u64| *page < PAGES - 16;
    let changed = (0..PAGES).filter(inside).filter(|page| (1..=4).contains(&(page % 8)) || *page == 24);
    assert_eq!(Vec::from_iter(private(&memory).into_iter().filter(inside)), Vec::from_iter(changed));
}

/// KVM's accesses are of this kind.
#[test]
fn the_kernel_gets_folded_pages_too() {
    let image = image();
    let (memory, folded) = trimmed(&image);
    let (reader, writer) = std::io::pipe().unwrap();
    let [mut reader, mut writer] = [OwnedFd::from(reader), writer.into()].map(File::from);
    let (folded, bytes) = served(folded, || {
        // Ten bytes of page 33 are the host's now, and what follows in that page stays.
        writer.write_all(&[1; 10]).unwrap();
        memory.ram().read_exact_volatile_from(GuestAddress(33 * PAGE + 50), &mut reader, 10).unwrap();
        memory.ram().write_all_volatile_to(GuestAddress(40 * PAGE), &mut writer, 8 * PAGE as usize).unwrap();
        let mut bytes = vec![0; 8 * PAGE as usize];
        io::Read::read_exact(&mut reader, &mut bytes).unwrap();
        bytes
    });
    assert_eq!(bytes, (40..48).flat_map(contents).collect::<Vec<_>>());
    folded.unfold().unwrap();
    let mut expected = contents(33);
    expected[50..60].fill(1);
    assert_eq!(page(&memory, 33), expected);
}

#[test]
fn several_threads_wait_for_the_same_pages() {
    let image = image();
    let (memory, folded) = trimmed(&image);
    let (folded, ()) = served(folded, || {
        thread::scope(|scope| {
            for _ in 0..4 {
                let check =
                    || (0..PAGES).for_each(|number| assert_eq!(page(&memory, number), contents(number)));
                scope.spawn(check);
            }
        });
    });
    assert!(folded.is_empty());
}

/// Whoever waits when all is brought back goes on, for a folded page or another.
#[test]
fn unfolding_wakes_who_waits() {
    let image = image();
    let (memory, folded) = trimmed(&image);
    thread::scope(|scope| {
        let waiting: Vec<_> = [9, 16, 126, 65]
            .map(|number| {
                let memory = &memory;
                scope.spawn(move || assert_eq!(page(memory, number), contents(number)))
            })
            .into_iter()
            .collect();
        thread::sleep(std::time::Duration::from_millis(50));
        assert!(waiting.iter().all(|thread| !thread.is_finished()), "nobody serves them");
        folded.unfold().unwrap();
    });
}

#[test]
fn much_that_is_touched_ends_the_rest() {
    let image = image();
    let (memory, mut folded) = trimmed(&image);
    thread::scope(|scope| {
        scope.spawn(|| (0..PAGES).for_each(|number| assert_eq!(page(&memory, number), contents(number))));
        while folded.serve().unwrap() == Rest::Goes {
            thread::yield_now();
        }
        folded.unfold().unwrap();
    });
    assert_eq!(page(&memory, 9), contents(9));
}

#[test]
fn a_rewind_of_what_was_folded_is_the_image() {
    for keep in [0, 1 << 20] {
        let image = image();
        let (memory, folded) = trimmed(&image);
        folded.unfold().unwrap();
        memory.rewind(&image, keep).unwrap();
        for number in 0..PAGES {
            assert_eq!(page(&memory, number), original(number), "page {number}");
        }
    }
}

/// Nobody ever sees the image's bytes in the place of a folded page.
#[test]
fn what_is_dropped_too_early_stays_out_of_reach() {
    let image = image();
    let (memory, folded) = trimmed(&image);
    drop(folded);
    let memory: &'static GuestMemory = Box::leak(Box::new(memory));
    let waiting = thread::spawn(|| page(memory, 9));
    thread::sleep(std::time::Duration::from_millis(100));
    assert!(!waiting.is_finished());
}

/// Trimmed, unfolded and trimmed again, in any order of accesses, the contents stay.
#[test]
fn again_and_again() {
    let image = image();
    let (memory, mut folded) = trimmed(&image);
    for round in 0..20 {
        folded = served(folded, || {
            for step in 0..10 {
                let number = (round * 37 + step * 11) % PAGES;
                assert_eq!(page(&memory, number), contents(number), "page {number}");
            }
        })
        .0;
        folded.unfold().unwrap();
        folded = memory.trim(&memory.private().unwrap(), &image).unwrap().folded.unwrap();
        assert_eq!(folded.len() as u64, PAGES / 8 * 3);
    }
    folded.unfold().unwrap();
    (0..PAGES).for_each(|number| assert_eq!(page(&memory, number), contents(number)));
}
