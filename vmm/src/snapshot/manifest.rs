//! `manifest.json`: what a snapshot is, small enough to be read by people.

use serde::{Deserialize, Serialize};

use super::{CHUNK, Error, FileSum, Index, file};
use crate::memory::layout::{MAX_MEMORY_MIB, MAX_VCPUS, MIB, MIN_MEMORY_MIB, PAGE, ram_regions};
use crate::protocol::{CpuTemplate, Payload};

/// Number of the format this build writes and reads. A snapshot is a build product: any other number is refused.
pub const FORMAT: u32 = 3;

/// Longest manifest in bytes.
pub(super) const MAX_MANIFEST: u64 = 64 * 1024;

/// Longest `state.json` in bytes.
pub(super) const MAX_STATE: u64 = 64 * 1024 * 1024;

/// Longest root image in bytes.
const MAX_ROOT: u64 = 1 << 40;

/// Most pages a mailbox can span.
const MAX_MAILBOX_PAGES: u64 = 16;

/// Description of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// Program and version that wrote it.
    pub tool: String,
    /// When it was written, in seconds since 1970.
    pub created: u64,
    /// Where it was written.
    pub host: HostTags,
    /// Guest memory in bytes, a whole number of MiB.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// CPU features the guest may see.
    pub cpu: CpuTemplate,
    /// What runs in it.
    pub payload: Payload,
    /// Where the guest waits.
    pub forkpoint: Forkpoint,
    /// `state.json`.
    pub state: FileSum,
    /// `root.erofs`, if the template has a root image.
    pub root: Option<FileSum>,
    /// The memory.
    pub image: ImageSummary,
}

/// Properties of the host that wrote a snapshot. Told to people when a snapshot does not fit; CPU features themselves
/// are compared from `state.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostTags {
    /// Machine architecture, such as `x86_64`.
    pub arch: String,
    /// CPUID vendor string, such as `AuthenticAMD`.
    pub cpu_vendor: String,
    /// Kernel release.
    pub kernel: String,
    /// KVM flavour, as the host probe names it.
    pub kvm: String,
}

/// Where the guest waits for its identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forkpoint {
    /// Guest-physical addresses of the mailbox's pages, in the order of its bytes.
    pub mailbox_pages: Vec<u64>,
    /// Length of the mailbox in bytes.
    pub mailbox_bytes: u64,
}

/// The memory in numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageSummary {
    /// Size of a chunk in bytes.
    pub chunk_bytes: u64,
    /// Chunks in all.
    pub chunks: u64,
    /// Chunks that are not all zeros.
    pub data_chunks: u64,
    /// Different contents among them: the number of chunk files.
    pub unique_chunks: u64,
    /// Length of all chunk files in bytes.
    pub stored_bytes: u64,
    /// `image.idx`.
    pub index: FileSum,
}

/// The one field every format has.
#[derive(Deserialize)]
struct Head {
    format: u32,
}

impl Manifest {
    /// Encodes as indented JSON.
    pub fn encode(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec_pretty(self).expect("a manifest is always representable");
        text.push(b'\n');
        text
    }

    /// The format number alone, readable whatever the rest has become.
    pub(super) fn decode_format(text: &[u8]) -> Result<u32, Error> {
        let head: Head =
            serde_json::from_slice(text).map_err(|source| Error::Json { file: file::MANIFEST, source })?;
        Ok(head.format)
    }

    /// Decodes and validates.
    pub fn decode(text: &[u8]) -> Result<Self, Error> {
        let manifest: Self =
            serde_json::from_slice(text).map_err(|source| Error::Json { file: file::MANIFEST, source })?;
        manifest.validate()?;
        Ok(manifest)
    }

    /// Checks every number against its range and against the others.
    pub fn validate(&self) -> Result<(), Error> {
        if self.format != FORMAT {
            return Err(Error::Format { found: self.format });
        }
        let memory = u64::from(MIN_MEMORY_MIB) * MIB..=u64::from(MAX_MEMORY_MIB) * MIB;
        within("memory_bytes", self.memory_bytes, *memory.start(), *memory.end())?;
        within("memory_bytes modulo 1 MiB", self.memory_bytes % MIB, 0, 0)?;
        within("vcpus", self.vcpus.into(), 1, MAX_VCPUS.into())?;
        within("state.length", self.state.length, 1, MAX_STATE)?;
        if let Some(root) = &self.root {
            within("root.length", root.length, 1, MAX_ROOT)?;
        }
        self.forkpoint.validate(self.memory_bytes)?;
        self.image.validate(self.memory_bytes)
    }
}

impl Forkpoint {
    fn validate(&self, memory_bytes: u64) -> Result<(), Error> {
        let pages = self.mailbox_pages.len() as u64;
        within("forkpoint.mailbox_pages", pages, 1, MAX_MAILBOX_PAGES)?;
        within("forkpoint.mailbox_bytes", self.mailbox_bytes, 1, pages * PAGE)?;
        for &page in &self.mailbox_pages {
            within("forkpoint.mailbox_pages offset in a page", page % PAGE, 0, 0)?;
            let regions = ram_regions(memory_bytes);
            if !regions.iter().any(|region| page.wrapping_sub(region.gpa) < region.len) {
                let end = regions.last().map_or(0, |region| region.gpa + region.len);
                return Err(out_of_range("forkpoint.mailbox_pages", page, 0, end - PAGE));
            }
        }
        Ok(())
    }
}

impl ImageSummary {
    fn validate(&self, memory_bytes: u64) -> Result<(), Error> {
        let chunks = memory_bytes / CHUNK as u64;
        within("image.chunk_bytes", self.chunk_bytes, CHUNK as u64, CHUNK as u64)?;
        within("image.chunks", self.chunks, chunks, chunks)?;
        within("image.data_chunks", self.data_chunks, 0, self.chunks)?;
        within("image.unique_chunks", self.unique_chunks, 0, self.data_chunks)?;
        let limit = Index::encoded_limit(self.chunks, self.unique_chunks);
        within("image.index.length", self.index.length, 1, limit)
    }
}

fn within(field: &'static str, value: u64, min: u64, max: u64) -> Result<(), Error> {
    if (min..=max).contains(&value) { Ok(()) } else { Err(out_of_range(field, value, min, max)) }
}

fn out_of_range(field: &'static str, value: u64, min: u64, max: u64) -> Error {
    Error::OutOfRange { field, value, min, max }
}

const _: () = assert!(CHUNK == 65536, "format 1 has chunks of 64 KiB");
const _: () = assert!(MIB.is_multiple_of(CHUNK as u64));

#[cfg(test)]
mod tests;
