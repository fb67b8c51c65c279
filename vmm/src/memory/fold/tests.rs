use super::*;

/// Numbers without a pattern (xorshift64), the same in each run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn page(&mut self) -> Page {
        std::array::from_fn(|_| self.next() as u8)
    }

    /// The image's page with up to so many bytes changed, anywhere.
    fn changed(&mut self, image: &Page, bytes: u64) -> Page {
        let mut page = *image;
        for _ in 0..bytes {
            page[(self.next() % PAGE) as usize] ^= 1 << (self.next() % 8);
        }
        page
    }
}

#[test]
fn a_folded_page_is_rebuilt_to_the_byte() {
    let mut numbers = Numbers(0x9E37_79B9_7F4A_7C15);
    let mut folds = Folds::with_room(1000).unwrap();
    let mut pages = Vec::new();
    for number in (0..4000).step_by(4) {
        let image = numbers.page();
        let bytes = numbers.next() % 400;
        let page = numbers.changed(&image, bytes);
        if folds.push(number, &page, &image) {
            pages.push((number, image, page));
        } else {
            assert!(bytes * WORD as u64 > MOST as u64 / 2, "page {number} differs in {bytes} bytes only");
        }
    }
    assert!((400..900).contains(&pages.len()), "{} of 1000", pages.len());
    assert_eq!(folds.len(), pages.len());
    for (index, (number, mut image, page)) in pages.into_iter().enumerate() {
        assert_eq!((folds.page(index), folds.find(number)), (Some(number), Ok(index)));
        assert_eq!(folds.find(number + 1), Err(index + 1));
        folds.unfold(index, &mut image);
        assert_eq!(image, page);
    }
}

#[test]
fn a_page_takes_half_of_its_bytes_at_most() {
    let image = Numbers(3).page();
    let mut folds = Folds::with_room(4).unwrap();
    // So many lines in all of their words.
    let changed = |lines: usize| {
        let mut page = image;
        page[..lines * LINE].iter_mut().for_each(|byte| *byte = !*byte);
        page
    };
    assert!(!folds.push(0, &changed(64), &image));
    assert!(!folds.push(1, &changed(32), &image));
    assert!(folds.push(1, &changed(31), &image));
    assert!(folds.push(2, &image, &image), "which takes nothing");
    assert!(folds.push(7, &changed(1), &image));
    for (index, lines) in [(0, 31), (1, 0), (2, 1)] {
        let mut page = image;
        folds.unfold(index, &mut page);
        assert_eq!(page, changed(lines));
    }
}

#[test]
fn the_rest_stays_exact_when_some_are_forgotten() {
    let mut numbers = Numbers(7);
    let mut folds = Folds::with_room(10).unwrap();
    let image = numbers.page();
    let pages: Vec<_> = (0..10).map(|_| numbers.changed(&image, 50)).collect();
    for (page, number) in pages.iter().zip(0..) {
        assert!(folds.push(number, page, &image));
    }
    folds.forget(3..5);
    folds.forget(0..1);
    assert_eq!(folds.len(), 7);
    assert_eq!((folds.find(4), folds.find(5)), (Err(2), Ok(2)));
    let mut page = image;
    folds.unfold(2, &mut page);
    assert_eq!(page, pages[5]);
}

#[test]
fn every_byte_of_a_page_counts() {
    let image = Numbers(11).page();
    for at in 0..PAGE as usize {
        let mut page = image;
        page[at] ^= 0x80;
        let mut folds = Folds::with_room(1).unwrap();
        assert!(folds.push(0, &page, &image));
        let mut rebuilt = image;
        folds.unfold(0, &mut rebuilt);
        assert!(rebuilt == page, "byte {at}");
    }
}
