//! What forks of a template may be expected to take.

use std::collections::HashMap;

use super::Settings;

/// How fast the mean follows what is seen: a sixteenth of the difference each time.
const MEAN: i64 = 16;

/// How fast the peak rises to what is seen, and how slowly it falls: it stays near the largest of a hundred forks
/// without believing a single one.
const RISE: i64 = 8;
const FALL: i64 = 512;

/// Bytes seen in forks of one template.
#[derive(Clone, Copy, Debug)]
struct Seen {
    mean: i64,
    peak: i64,
}

/// Expected bytes of one fork of a template.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Growth {
    /// What is set aside for a new one.
    pub ahead: u64,
    /// What living ones hold already, in the mean.
    pub held: u64,
}

impl Growth {
    /// What a living fork may still take.
    pub fn outstanding(self) -> u64 {
        self.ahead.saturating_sub(self.held)
    }
}

/// By template.
#[derive(Debug, Default)]
pub struct Forecast(HashMap<String, Seen>);

impl Forecast {
    /// A fork of `template` holds `bytes` of its own.
    pub fn saw(&mut self, template: &str, bytes: u64) {
        let bytes = bytes.cast_signed();
        let Some(seen) = self.0.get_mut(template) else {
            self.0.insert(template.to_owned(), Seen { mean: bytes, peak: bytes });
            return;
        };
        seen.mean += (bytes - seen.mean) / MEAN;
        seen.peak += if bytes > seen.peak { (bytes - seen.peak) / RISE } else { (bytes - seen.peak) / FALL };
    }

    /// What to expect of a fork of `template`, whose guest has so much memory: it cannot take more than all of it.
    pub fn of(&self, template: &str, settings: &Settings, memory_mib: u32) -> Growth {
        let all = u64::from(memory_mib) << 20;
        let Some(seen) = self.0.get(template) else {
            return Growth { ahead: settings.growth.min(all), held: 0 };
        };
        let expected = (seen.peak.max(0) as f64 * settings.factor) as u64;
        Growth { ahead: expected.max(settings.growth).min(all), held: seen.mean.max(0).cast_unsigned() }
    }

    /// Forgets the templates that `keep` does not know.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.0.retain(|name, _| keep(name));
    }
}
