//! Which parts of an image are kept in large pages.

use std::collections::{BTreeMap, BTreeSet};

use super::layout::PAGE;
use crate::sys::mapping::LARGE_PAGE;

/// Pages in a large page.
const PAGES: u64 = LARGE_PAGE / PAGE;

/// Pages that forks read in a part from which on it is worth up to 2 MiB of the host's memory, once for all forks: as
/// many faults are saved in each fork made from nothing, and two page-table pages.
const ENOUGH: u64 = 8;

/// Starts, in bytes of the image, of the large pages of which forks read [`ENOUGH`] pages and write none, in order. A page that
/// is written takes its large page apart again in that fork. Runs are first pages and how many; `bytes` is the image's length.
pub(super) fn worth_it(read: &[(u64, u64)], written: &[&[(u64, u64)]], bytes: u64) -> Vec<u64> {
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
        .filter(|(part, pages)| *pages >= ENOUGH && !written.contains(part))
        .map(|(part, _)| part * LARGE_PAGE)
        .collect()
}

#[cfg(test)]
mod tests;
