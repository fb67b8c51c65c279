//! Which pages a fork touches first: `working-set.json`, beside the snapshot and optional.
//!
//! ```text
//! {"format":1,"read":[[first_page,pages],...],"write":[[first_page,pages],...],"acknowledge":[[first_page,pages],...]}
//! ```
//!
//! Pages of 4 KiB by their number in the image; each list is sorted and its ranges are disjoint; a page that is written is in
//! `write` only; `acknowledge` are those of `write` that are written before the acknowledgement, and may be absent. It is advice: wrong, it costs time and memory, never correctness. So it is not part of what the
//! manifest vouches for, may be replaced at any time, and is read like everything else from disk: checked, or refused.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::dir::Dir;
use super::{CHUNK, Damage, Error, Snapshot, damaged, file, io_error};
use crate::memory::layout::PAGE;

/// Number of the format this build writes and reads.
const FORMAT: u32 = 1;

/// Most ranges in each list: a set in more pieces than this is no set that anything can be done with in one batch.
const MAX_RANGES: usize = 1 << 16;

/// Longest file in bytes: both lists full, 24 bytes a range.
const MAX_BYTES: u64 = 48 * MAX_RANGES as u64;

/// A run of pages of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u64, u64)", into = "(u64, u64)")]
pub struct PageRange {
    /// Number of the first page.
    pub first: u64,
    /// How many; at least one.
    pub pages: u64,
}

impl From<(u64, u64)> for PageRange {
    fn from((first, pages): (u64, u64)) -> Self {
        Self { first, pages }
    }
}

impl From<PageRange> for (u64, u64) {
    fn from(range: PageRange) -> Self {
        (range.first, range.pages)
    }
}

/// The pages that a fork touches between its forkpoint and its first answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    /// Read and not written.
    pub read: Vec<PageRange>,
    /// Written.
    pub write: Vec<PageRange>,
    /// Of those, the ones written before the fork acknowledges its identity; none if that is not known.
    pub acknowledge: Vec<PageRange>,
}

/// As it is on disk.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format: u32,
    read: Vec<PageRange>,
    write: Vec<PageRange>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    acknowledge: Vec<PageRange>,
}

impl WorkingSet {
    /// From page numbers in any order, repeated or not; what is written is taken out of what is read.
    pub fn new(read: impl IntoIterator<Item = u64>, write: impl IntoIterator<Item = u64>) -> Self {
        let write: BTreeSet<u64> = write.into_iter().collect();
        let read: BTreeSet<u64> = read.into_iter().filter(|page| !write.contains(page)).collect();
        Self { read: ranges(read), write: ranges(write), acknowledge: Vec::new() }
    }

    /// The same and what `other` has touched; what one of them has written counts as written.
    #[must_use]
    pub fn with(&self, other: &Self) -> Self {
        let both = |of: fn(&Self) -> &[PageRange]| numbers(of(self)).chain(numbers(of(other)));
        Self::new(both(|set| &set.read), both(|set| &set.write))
    }

    /// The same with those of its written pages that `first`, its beginning, has written too, as `acknowledge`.
    #[must_use]
    pub fn beginning_with(self, first: &Self) -> Self {
        let begun: BTreeSet<u64> = numbers(&first.write).collect();
        let acknowledge = ranges(numbers(&self.write).filter(|page| begun.contains(page)).collect());
        Self { acknowledge, ..self }
    }

    /// Pages written after the acknowledgement.
    pub fn written_later(&self) -> Vec<PageRange> {
        let begun: BTreeSet<u64> = numbers(&self.acknowledge).collect();
        ranges(numbers(&self.write).filter(|page| !begun.contains(page)).collect())
    }

    /// Number of pages read, and of pages written.
    pub fn pages(&self) -> (u64, u64) {
        let count = |ranges: &[PageRange]| ranges.iter().map(|range| range.pages).sum();
        (count(&self.read), count(&self.write))
    }

    /// The chunks these pages are in, each once, in order.
    pub fn chunks(&self) -> Vec<u64> {
        let per_chunk = CHUNK as u64 / PAGE;
        let of = |range: &PageRange| range.first / per_chunk..=(range.first + range.pages - 1) / per_chunk;
        let all: BTreeSet<u64> = self.read.iter().chain(&self.write).flat_map(of).collect();
        all.into_iter().collect()
    }

    /// Writes it into the snapshot directory at `path`, and the pages it names beside it, in place of an older one.
    /// Each file is replaced durably and in one step; between the two steps they may differ, which hurts nobody.
    ///
    /// # Errors
    /// [`Error`] when the snapshot is damaged or cannot be written to; an older one is then still there.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        self.write_by_stages(&[], path)
    }

    /// As [`WorkingSet::write`], with the pages in the order in which they are wanted: `stages` are parts of this set, each of
    /// which a fork reaches before the next and before the rest. Those of the first are marked as urgent; without stages
    /// all are. What lies beside pages that are written comes last, as far as there is room.
    ///
    /// # Errors
    /// As [`WorkingSet::write`].
    pub fn write_by_stages(&self, stages: &[Self], path: &Path) -> Result<(), Error> {
        let snapshot = Snapshot::open(path)?;
        let dir = snapshot.directory();
        let (first, later) = stages.split_first().unwrap_or((self, &[]));
        let mut known: HashSet<u64> = HashSet::new();
        let mut new =
            |pages: &mut dyn Iterator<Item = u64>| pages.filter(|&page| known.insert(page)).collect();
        let (written, read) = (new(&mut numbers(&first.write)), new(&mut numbers(&first.read)));
        let near = [first].into_iter().chain(later).chain([self]).flat_map(Self::near_written);
        let others = new(&mut later.iter().chain([self]).flat_map(Self::in_order).chain(near));
        let pages = snapshot.pack_pages([written, read, others])?;
        dir.replace_durably(file::WORKING_PAGES, &pages)?;
        dir.replace_durably(file::WORKING_SET, &self.encode())
    }

    /// All pages; what is written is certain to be wanted, so it comes before what is read.
    fn in_order(&self) -> impl Iterator<Item = u64> {
        numbers(&self.write).chain(numbers(&self.read))
    }

    /// All pages of the chunks in which pages are written. Another fork's kernel may take its memory from beside where this one's did,
    /// and a page by itself comes for a seventh of what its chunk takes.
    fn near_written(&self) -> impl Iterator<Item = u64> {
        let per_chunk = CHUNK as u64 / PAGE;
        let chunk_of = move |page: u64| (page - page % per_chunk)..(page - page % per_chunk + per_chunk);
        numbers(&self.write).flat_map(chunk_of)
    }

    fn encode(&self) -> Vec<u8> {
        let Self { read, write, acknowledge } = self.clone();
        let document = Document { format: FORMAT, read, write, acknowledge };
        serde_json::to_vec(&document).expect("numbers are JSON")
    }

    /// Decodes for an image of `memory_bytes`; everything is checked.
    fn decode(text: &[u8], memory_bytes: u64) -> Result<Self, Error> {
        let Document { format, read, write, acknowledge } =
            serde_json::from_slice(text).map_err(|source| Error::Json { file: file::WORKING_SET, source })?;
        let bad = |what| damaged(file::WORKING_SET, Damage::Structure(what));
        if format != FORMAT {
            return Err(bad("it has another format"));
        }
        check(&read, memory_bytes / PAGE).map_err(bad)?;
        check(&write, memory_bytes / PAGE).map_err(bad)?;
        check(&acknowledge, memory_bytes / PAGE).map_err(bad)?;
        if overlap(&read, &write) {
            return Err(bad("a page is in both of its lists"));
        }
        let written: HashSet<u64> = numbers(&write).collect();
        if !numbers(&acknowledge).all(|page| written.contains(&page)) {
            return Err(bad("a page is written first and yet not written"));
        }
        Ok(Self { read, write, acknowledge })
    }
}

impl Snapshot {
    /// The recorded working set, if there is one.
    ///
    /// # Errors
    /// [`Error`] when it cannot be read or is not what it should be; the snapshot is as good without it.
    pub fn working_set(&self) -> Result<Option<WorkingSet>, Error> {
        match self.directory().read(file::WORKING_SET, MAX_BYTES) {
            Ok(text) => WorkingSet::decode(&text, self.manifest().memory_bytes).map(Some),
            Err(Error::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Dir {
    /// Writes a file beside its final name and gives it that, in place of what had it.
    fn replace_durably(&self, name: &'static str, bytes: &[u8]) -> Result<(), Error> {
        let beside = format!(".{name}.new");
        // What a crash left of an earlier attempt.
        match self.remove_file(&beside) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(io_error("remove", beside)(error));
            }
            _ => {}
        }
        self.write_durably(&beside, bytes)?;
        self.rename(&beside, name).map_err(io_error("rename to", name))?;
        self.sync().map_err(io_error("sync", "the directory"))
    }
}

impl fmt::Display for WorkingSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (read, write) = self.pages();
        write!(f, "{read} pages read, {write} written")
    }
}

fn numbers(ranges: &[PageRange]) -> impl Iterator<Item = u64> {
    ranges.iter().flat_map(|range| range.first..range.first + range.pages)
}

fn ranges(pages: BTreeSet<u64>) -> Vec<PageRange> {
    let mut out: Vec<PageRange> = Vec::new();
    for page in pages {
        match out.last_mut() {
            Some(last) if last.first + last.pages == page => last.pages += 1,
            _ => out.push(PageRange { first: page, pages: 1 }),
        }
    }
    out
}

fn check(ranges: &[PageRange], pages: u64) -> Result<(), &'static str> {
    if ranges.len() > MAX_RANGES {
        return Err("it has too many ranges");
    }
    let mut end = 0;
    for range in ranges {
        if range.first < end {
            return Err("its ranges are not in order");
        }
        let after = range.first.checked_add(range.pages).filter(|&after| after <= pages && range.pages > 0);
        end = after.ok_or("a range is empty or outside of the memory")?;
    }
    Ok(())
}

/// Whether two lists, each in order, share a page.
fn overlap(a: &[PageRange], b: &[PageRange]) -> bool {
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
        if x.first + x.pages <= y.first {
            a.next();
        } else if y.first + y.pages <= x.first {
            b.next();
        } else {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests;
