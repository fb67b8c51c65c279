//! Which parts of an image, and of a root image, are kept in large pages.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
};

use super::layout::PAGE;
use crate::sys::{
    mapping::{LARGE_PAGE, Mapping},
    memfd::SealedMemory,
};

/// Pages in a large page.
const PAGES: u64 = LARGE_PAGE / PAGE;

/// Pages that forks read in a part from which on it is worth up to 2 MiB of the host's memory, once for all forks: as
/// many faults are saved in each fork made from nothing, and two page-table pages.
const ENOUGH: u64 = 4;

/// The same for a root image, whose parts have to be copied for that, and of which the kernel maps 16 pages where one is read.
const ENOUGH_OF_ROOT: u64 = 4 * 16;

/// Most parts of a root image that are copied: 32 MiB.
const MOST_OF_ROOT: usize = 16;

/// Bytes copied at a time.
const PIECE: usize = 64 * 1024;

/// Replaces the parts of `root` of which forks read much (`read`: first pages and how many) by copies in large pages, for this
/// process and those that are forked from it. Returns how many there are.
///
/// # Errors
/// The host's refusal; all contents are there then, too.
pub fn copy_root(root: Mapping, read: &[(u64, u64)]) -> io::Result<usize> {
    let mut parts = parts_with(ENOUGH_OF_ROOT, read, &[], root.len() as u64);
    parts.truncate(MOST_OF_ROOT);
    if parts.is_empty() {
        return Ok(0);
    }
    let memory = SealedMemory::new("forkling-root", parts.len() as u64 * LARGE_PAGE)?;
    let mut buffer = vec![0; PIECE];
    for (&part, to) in parts.iter().zip((0..).step_by(LARGE_PAGE as usize)) {
        for piece in (0..LARGE_PAGE).step_by(PIECE) {
            root.read(part + piece, &mut buffer);
            memory.write(to + piece, &buffer);
        }
    }
    for (&part, from) in parts.iter().zip((0..).step_by(LARGE_PAGE as usize)) {
        root.put_over(part, LARGE_PAGE, &memory, from)?;
        // Refused, the copy is as good in small pages.
        let _ = root.collapse(part, LARGE_PAGE);
    }
    Ok(parts.len())
}

/// Starts, in bytes of the image, of the large pages of which forks read [`ENOUGH`] pages and write none, in order. A page that
/// is written takes its large page apart again in that fork. Runs are first pages and how many; `bytes` is the image's length.
pub(super) fn worth_it(read: &[(u64, u64)], written: &[&[(u64, u64)]], bytes: u64) -> Vec<u64> {
    parts_with(ENOUGH, read, written, bytes)
}

fn parts_with(enough: u64, read: &[(u64, u64)], written: &[&[(u64, u64)]], bytes: u64) -> Vec<u64> {
    let whole = bytes / LARGE_PAGE;
    let parts = |&(first, pages): &(u64, u64)| {
        let end = first.saturating_add(pages).min(whole * PAGES);
        (first / PAGES..end.div_ceil(PAGES)).map(move |part| {
            let (from, to) = (first.max(part * PAGES), end.min((part + 1) * PAGES));
            (part, to.saturating_sub(from))
        })
    };
    let written: BTreeSet<u64> =
        written.iter().flat_map(|runs| runs.iter().flat_map(parts)).map(|(part, _)| part).collect();
    let mut reads: BTreeMap<u64, u64> = BTreeMap::new();
    for (part, pages) in read.iter().flat_map(parts) {
        *reads.entry(part).or_default() += pages;
    }
    reads
        .into_iter()
        .filter(|(part, pages)| *pages >= enough && !written.contains(part))
        .map(|(part, _)| part * LARGE_PAGE)
        .collect()
}

#[cfg(test)]
mod tests;
