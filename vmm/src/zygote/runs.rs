//! Runs of pages.

use crate::protocol::PageRun;

/// The pages of `sets` in order, neighbours joined across gaps of any length that have none of the pages of `but`.
pub fn joined(sets: &[&[PageRun]], but: &[PageRun]) -> Vec<PageRun> {
    let sorted = |runs: &mut dyn Iterator<Item = PageRun>| {
        let mut runs: Vec<PageRun> = runs.filter(|(_, pages)| *pages > 0).collect();
        runs.sort_unstable();
        runs
    };
    let wanted = sorted(&mut sets.iter().flat_map(|set| set.iter().copied()));
    let unwanted = sorted(&mut but.iter().copied());
    let mut joined: Vec<PageRun> = Vec::new();
    for (first, pages) in wanted {
        let end = first.saturating_add(pages);
        match joined.last_mut() {
            Some(last) if !any_in(&unwanted, last.0.saturating_add(last.1), first) => {
                last.1 = last.1.max(end - last.0);
            }
            _ => joined.push((first, pages)),
        }
    }
    joined
}

/// Whether one of `runs`, which are in order and do not overlap, has a page from `start` to before `end`.
fn any_in(runs: &[PageRun], start: u64, end: u64) -> bool {
    let next = runs.partition_point(|(first, pages)| first.saturating_add(*pages) <= start);
    start < end && runs.get(next).is_some_and(|(first, _)| *first < end)
}

#[cfg(test)]
mod tests;
