use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;

use super::{CHUNK, Draft, Error, Filling, Image, Residency, self_test};
use crate::memory::layout::PAGE;
use crate::sys::uffd::{Scope, Uffd};

const LEN: u64 = 16 * CHUNK as u64;

fn bytes_of(image: &Image, chunk: u64) -> Vec<u8> {
    let mut bytes = vec![0; CHUNK];
    let reader = File::from(image.reader().try_clone_to_owned().unwrap());
    reader.read_exact_at(&mut bytes, chunk * CHUNK as u64).unwrap();
    bytes
}

/// Or says what is missing.
#[test]
fn the_self_test_passes_where_faults_of_the_kernel_can_be_had() {
    match self_test() {
        Ok(()) => {}
        Err(Error::NoUserfaultfd(_)) => assert!(Uffd::new(Scope::UserAndKernel).is_err()),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn chunks_go_from_empty_to_ready() {
    for image in [Image::new(LEN).unwrap(), Image::eager(LEN).unwrap()] {
        assert_eq!(image.residency(3), Residency::Empty);
        assert_eq!(image.claim(3), Residency::Empty);
        assert_eq!(image.claim(3), Residency::Loading);
        image.release(3);
        assert_eq!(image.claim(3), Residency::Empty);
        assert_eq!(image.insert(3, &[9; CHUNK]).unwrap(), 0);
        assert_eq!(image.claim(3), Residency::Ready);
        assert_eq!(image.ready_chunks(), 1);
        assert_eq!(bytes_of(&image, 3), [9; CHUNK]);
        assert_eq!(image.resident_bytes().unwrap(), CHUNK as u64);
    }
}

#[test]
fn this_host_fills_lazily() {
    assert_eq!(Image::new(LEN).unwrap().filling(), Filling::Lazy);
}

/// A process with the descriptor can make zero pages appear by reading a hole; they must not stay.
#[test]
fn pages_brought_in_by_others_get_the_right_contents() {
    let image = Image::new(LEN).unwrap();
    // A read-only shared mapping, registered nowhere.
    let reader = File::from(image.reader().try_clone_to_owned().unwrap());
    let foreign = memmap2::MmapOptions::new().populate().map_raw_read_only(&reader).unwrap();
    assert!(image.resident_bytes().unwrap() >= LEN);
    assert_eq!(image.claim(0), Residency::Empty);
    assert_eq!(image.insert(0, &[4; CHUNK]).unwrap(), CHUNK / PAGE as usize);
    assert_eq!(bytes_of(&image, 0), [4; CHUNK]);
    drop(foreign);
}

#[test]
#[should_panic(expected = "claimed before")]
fn inserting_without_a_claim_is_a_bug() {
    let _ = Image::new(LEN).unwrap().insert(0, &[0; CHUNK]);
}

#[test]
fn one_of_many_claims_wins() {
    let image = Arc::new(Image::eager(LEN).unwrap());
    let claim = |image: &Arc<Image>| {
        let image = Arc::clone(image);
        thread::spawn(move || (0..16).filter(|&chunk| image.claim(chunk) == Residency::Empty).count())
    };
    let threads: Vec<_> = (0..4).map(|_| claim(&image)).collect();
    assert_eq!(threads.into_iter().map(|thread| thread.join().unwrap()).sum::<usize>(), 16);
}

#[test]
fn single_pages_come_first_and_their_chunk_completes_them() {
    let image = Image::new(LEN).unwrap();
    let mut pages = [0; CHUNK];
    pages[..4096].fill(7);
    pages[4096..8192].fill(8);
    assert_eq!(image.insert_pages(&[3, 17], &pages).unwrap(), 0);
    assert_eq!(image.resident_bytes().unwrap(), 2 * PAGE);
    assert!(image.has_page(3) && image.has_page(17) && !image.has_page(2) && !image.has_page(16));
    assert_eq!(image.residency(0), Residency::Empty);
    // Once more, nothing happens.
    assert_eq!(image.insert_pages(&[17], &[9; CHUNK]).unwrap(), 0);
    assert_eq!(image.claim(0), Residency::Empty);
    assert_eq!(image.insert(0, &[5; CHUNK]).unwrap(), 0, "its own page is not foreign");
    let mut expected = [5; CHUNK];
    expected[3 * 4096..4 * 4096].fill(7);
    assert_eq!(bytes_of(&image, 0), expected);
    assert_eq!(bytes_of(&image, 1)[4096..8192], [8; 4096]);
    assert!(image.has_page(2) && !image.has_page(16));
    assert_eq!(image.insert_pages(&[5], &[9; CHUNK]).unwrap(), 0);
    assert_eq!(bytes_of(&image, 0), expected, "what came with the chunk stays");
}

#[test]
fn what_a_draft_was_given_is_there_and_nothing_else() {
    let mut draft = Draft::new(LEN).unwrap();
    let contents: Vec<u8> = [3, 4, 5].into_iter().flat_map(|byte| [byte; PAGE as usize]).collect();
    draft.write_pages(&[17, 18, 2], &contents).unwrap();
    let image = draft.finish().unwrap();
    assert_eq!(image.resident_bytes().unwrap(), 3 * PAGE);
    let there: Vec<u64> = (0..LEN / PAGE).filter(|&page| image.has_page(page)).collect();
    assert_eq!(there, [2, 17, 18]);
    let mut page = [0; PAGE as usize];
    let reader = File::from(image.reader().try_clone_to_owned().unwrap());
    for (number, byte) in [(17, 3), (18, 4), (2, 5), (3, 0)] {
        reader.read_exact_at(&mut page, number * PAGE).unwrap();
        assert_eq!(page, [byte; PAGE as usize], "page {number}");
    }
    // A chunk brings what is missing of it.
    image.claim(1);
    assert_eq!(image.insert(1, &[9; CHUNK]).unwrap(), 0, "nobody else has put anything there");
    reader.read_exact_at(&mut page, 17 * PAGE).unwrap();
    assert_eq!(page, [3; PAGE as usize]);
}
