//! Where figures go: a line each in `latest.jsonl`, with their samples beside in `samples.jsonl`.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    figure::{Figure, Spread, quantile},
    host::Origin,
};

/// File of the figures.
pub const FIGURES: &str = "latest.jsonl";

/// File of the samples.
const SAMPLES: &str = "samples.jsonl";

/// Most samples kept of a figure; more are thinned to as many quantiles.
const MAX_SAMPLES: usize = 2000;

/// The samples of a figure, sorted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Samples {
    /// The figure's.
    pub id: String,
    /// Ascending.
    pub values: Vec<f64>,
}

/// Collects figures.
#[derive(Debug)]
pub struct Results {
    /// What the figures are taken on.
    pub origin: Origin,
    /// `native.null` for instance.
    prefix: String,
    directory: PathBuf,
    only: Vec<String>,
}

impl Results {
    /// For figures `ORIGIN.GUEST.*` whose id begins with one of `only`, or all, written into `directory`.
    pub fn new(origin: Origin, guest: &str, directory: &Path, only: Vec<String>) -> anyhow::Result<Self> {
        fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
        let prefix = format!("{}.{guest}", origin.place);
        Ok(Self { origin, prefix, directory: directory.to_owned(), only })
    }

    /// For figures of something else beside, `ORIGIN.NAME.*`.
    pub fn beside(&self, name: &str) -> Self {
        let Self { origin, prefix: _, directory, only } = self;
        let prefix = format!("{}.{name}", origin.place);
        Self { origin: origin.clone(), prefix, directory: directory.clone(), only: only.clone() }
    }

    /// The whole id of `what`.
    pub fn id(&self, what: &str) -> String {
        format!("{}.{what}", self.prefix)
    }

    /// Whether any figure that begins with one of `starts` is wanted.
    pub fn wants(&self, starts: &[&str]) -> bool {
        let wanted = |start: &&str| {
            let id = self.id(start);
            let meets = |only: &String| {
                let only = if only.starts_with(&self.prefix) { only.clone() } else { self.id(only) };
                id.starts_with(&only) || only.starts_with(&id)
            };
            self.only.iter().any(meets)
        };
        self.only.is_empty() || starts.iter().any(wanted)
    }

    /// Keeps a figure, on disk at once, and shows it.
    pub fn record(
        &self,
        what: &str,
        unit: &str,
        mut values: Vec<f64>,
        note: Option<&str>,
    ) -> anyhow::Result<()> {
        let id = self.id(what);
        let Some(Spread { min, p50, p99, max }) = Spread::of(&mut values) else {
            bail!("{id} has no samples")
        };
        let Origin { place, host, kvm, rev } = self.origin.clone();
        let note = note.map(str::to_owned);
        let (n, unit) = (values.len(), unit.to_owned());
        let figure = Figure { id: id.clone(), unit, n, min, p50, p99, max, place, host, kvm, rev, note };
        show(&figure);
        merge(&self.directory, &[figure], &[Samples { id, values: thinned(values) }])
    }

    /// The figures taken so far, earlier runs into the same directory included, by id.
    pub fn taken(&self) -> anyhow::Result<BTreeMap<String, Figure>> {
        figures(&self.directory)
    }

    /// Says on the table why a figure is not there.
    pub fn skip(&self, what: &str, why: &str) {
        println!("{:46} -- {why}", self.id(what));
    }
}

/// Prints a figure as a line of the table.
pub fn show(figure: &Figure) {
    let Figure { id, unit, n, min, p50, p99, max, .. } = figure;
    let note = figure.note.as_deref().map(|note| format!("  ({note})")).unwrap_or_default();
    println!("{id:46} {min:10.3} {p50:10.3} {p99:10.3} {max:10.3} {unit:4} n={n}{note}");
}

/// Prints the head of the table.
pub fn show_head() {
    println!("{:46} {:>10} {:>10} {:>10} {:>10}", "", "min", "p50", "p99", "max");
}

/// At most [`MAX_SAMPLES`] of the sorted values, ends included.
fn thinned(values: Vec<f64>) -> Vec<f64> {
    if values.len() <= MAX_SAMPLES {
        return values;
    }
    (0..MAX_SAMPLES).map(|at| quantile(&values, at as f64 / (MAX_SAMPLES - 1) as f64)).collect()
}

/// Puts figures and samples into the files of a directory, each in the place of an older one of the same id.
pub fn merge(directory: &Path, figures: &[Figure], samples: &[Samples]) -> anyhow::Result<()> {
    fs::create_dir_all(directory)?;
    update(&directory.join(FIGURES), figures, |figure| &figure.id)?;
    update(&directory.join(SAMPLES), samples, |samples| &samples.id)
}

fn update<T: Serialize + DeserializeOwned + Clone>(
    path: &Path,
    new: &[T],
    id: impl Fn(&T) -> &String,
) -> anyhow::Result<()> {
    let mut all: Vec<T> = read_lines(path)?;
    all.retain(|old| new.iter().all(|newer| id(newer) != id(old)));
    all.extend_from_slice(new);
    all.sort_by(|left, right| id(left).cmp(id(right)));
    let mut text = String::new();
    for item in &all {
        text += &serde_json::to_string(item)?;
        text.push('\n');
    }
    // Renamed into its place: whoever reads meanwhile sees the old or the new.
    let scratch = path.with_extension("new");
    fs::write(&scratch, text).with_context(|| format!("cannot write {}", scratch.display()))?;
    fs::rename(&scratch, path).with_context(|| format!("cannot write {}", path.display()))
}

/// The figures of a directory or file, by id.
pub fn figures(path: &Path) -> anyhow::Result<BTreeMap<String, Figure>> {
    let path = if path.is_dir() { path.join(FIGURES) } else { path.to_owned() };
    let figures: Vec<Figure> = read_lines(&path)?;
    Ok(figures.into_iter().map(|figure| (figure.id.clone(), figure)).collect())
}

/// The samples of a directory, by id.
pub fn samples(directory: &Path) -> anyhow::Result<BTreeMap<String, Vec<f64>>> {
    let samples: Vec<Samples> = read_lines(&directory.join(SAMPLES))?;
    Ok(samples.into_iter().map(|samples| (samples.id, samples.values)).collect())
}

/// Merges the files of `from` into those of `into`.
pub fn merge_directory(from: &Path, into: &Path) -> anyhow::Result<()> {
    let figures: Vec<Figure> = figures(from)?.into_values().collect();
    let samples: Vec<Samples> =
        samples(from)?.into_iter().map(|(id, values)| Samples { id, values }).collect();
    merge(into, &figures, &samples)
}

fn read_lines<T: DeserializeOwned>(path: &Path) -> anyhow::Result<Vec<T>> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        result => result.with_context(|| format!("cannot read {}", path.display()))?,
    };
    let line = |line| serde_json::from_str(line).with_context(|| format!("{}: {line}", path.display()));
    text.lines().filter(|line| !line.is_empty()).map(line).collect()
}

#[cfg(test)]
mod tests;
