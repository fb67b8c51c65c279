//! Pages as what makes them other than the image's: which words of which lines differ, and those words.

use std::{io, ops::Range};

use memmap2::{Advice, MmapMut};

use super::layout::PAGE;

/// Bytes of a line: what a kernel writes at a time tends to lie in one, and a page has as many as a `u64` has bits.
const LINE: usize = 64;

/// Bytes of a word, of which a line has as many as a byte has bits.
const WORD: usize = 8;

/// Most bytes that a folded page takes: half of what it has, as pages that differ in more tend to differ in nearly all.
const MOST: usize = PAGE as usize / 2;

/// A page's bytes.
pub type Page = [u8; PAGE as usize];

const _: () = assert!(PAGE as usize == LINE * u64::BITS as usize && LINE == WORD * u8::BITS as usize);

/// Folded pages. What differs lies in a mapping of its own, of which memory is taken as far as it is used, and which is given back whole:
/// for each line that differs a byte that says which of its words do, then those.
#[derive(Debug)]
pub struct Folds {
    folds: Vec<Fold>,
    bytes: MmapMut,
    /// Bytes that are in use.
    used: usize,
}

/// One folded page.
#[derive(Clone, Copy, Debug)]
struct Fold {
    /// Its number in the image.
    page: u32,
    /// Where its bytes begin.
    start: u32,
    /// Which of its lines differ.
    lines: u64,
}

impl Folds {
    /// Room for so many pages, above zero.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn with_room(pages: usize) -> io::Result<Self> {
        // A page is found to take too much at the end of a line.
        let bytes = MmapMut::map_anon(pages * MOST + 1 + LINE)?;
        match bytes.advise(Advice::NoHugePage) {
            // A kernel without large pages does not know the advice.
            Err(error) if error.raw_os_error() != Some(libc::EINVAL) => return Err(error),
            _ => {}
        }
        Ok(Self { folds: Vec::with_capacity(pages), bytes, used: 0 })
    }

    /// Folds `ours`, a page that is `theirs` in the image, unless that would take more than half a page; tells whether it did.
    ///
    /// # Panics
    /// When there is no room, or the page does not come after all others.
    pub fn push(&mut self, page: u64, ours: &Page, theirs: &Page) -> bool {
        let page = u32::try_from(page).expect("a guest has fewer pages");
        assert!(self.folds.last().is_none_or(|last| last.page < page), "pages come in ascending order");
        let start = self.used;
        let (mut at, mut lines) = (start, 0);
        for (line, (ours, theirs)) in ours.chunks_exact(LINE).zip(theirs.chunks_exact(LINE)).enumerate() {
            if ours == theirs {
                continue;
            }
            lines |= 1 << line;
            let (mut words, words_at) = (0, at);
            at += 1;
            for (word, (ours, theirs)) in ours.chunks_exact(WORD).zip(theirs.chunks_exact(WORD)).enumerate() {
                if ours != theirs {
                    words |= 1 << word;
                    self.bytes[at..][..WORD].copy_from_slice(ours);
                    at += WORD;
                }
            }
            self.bytes[words_at] = words;
            if at - start > MOST {
                return false;
            }
        }
        self.used = at;
        self.folds.push(Fold { page, start: start as u32, lines });
        true
    }

    /// Makes the image's bytes of the page at `index` the page's own.
    pub fn unfold(&self, index: usize, page: &mut [u8]) {
        let Fold { start, lines, .. } = self.folds[index];
        let mut bytes = &self.bytes[start as usize..];
        for line in bits(lines) {
            let (&words, mut rest) = bytes.split_first().expect("each line has its words");
            for word in bits(words.into()) {
                let (ours, further) = rest.split_at(WORD);
                page[line * LINE + word * WORD..][..WORD].copy_from_slice(ours);
                rest = further;
            }
            bytes = rest;
        }
    }

    /// Forgets the pages at these indices.
    pub fn forget(&mut self, indices: Range<usize>) {
        self.folds.drain(indices);
    }

    /// Number of the page at `index`; they ascend.
    pub fn page(&self, index: usize) -> Option<u64> {
        self.folds.get(index).map(|fold| fold.page.into())
    }

    /// Where this page is, or (`Err`) the first one after it.
    pub fn find(&self, page: u64) -> Result<usize, usize> {
        self.folds.binary_search_by_key(&page, |fold| fold.page.into())
    }

    /// How many pages there are.
    pub fn len(&self) -> usize {
        self.folds.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.folds.is_empty()
    }
}

/// The numbers of the bits that are set.
fn bits(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = (mask != 0).then(|| mask.trailing_zeros() as usize)?;
        mask &= mask - 1;
        Some(bit)
    })
}

#[cfg(test)]
mod tests;
