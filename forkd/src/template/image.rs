//! The images of loaded templates: opened from their snapshots, filled, and shared by zygotes and forks.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, Mutex},
};

use forkling_vmm::{
    memory::image::{self, Contents, Image, Residency},
    snapshot::{self, CHUNK, ChunkKind, ChunkReader, Snapshot},
};

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The snapshot cannot be read, or is damaged.
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    /// No memory for the image, or it cannot be filled.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// A fork asks for pages of an image that is not loaded.
    #[error("the image of template {0} is not loaded")]
    Unknown(String),
    /// A fork asks to be paged although all images are complete here.
    #[error("images are loaded eagerly here, so fork {0} needs no pager; its binary is of another build")]
    Eager(String),
}

/// Images in memory, by template.
#[derive(Debug, Default)]
pub struct Images {
    images: Mutex<HashMap<String, Arc<Image>>>,
}

/// A template's memory as its zygote gets it.
#[derive(Debug)]
pub struct Opened {
    /// Read-only descriptor of the image.
    pub reader: OwnedFd,
    /// Whether pages may still be missing.
    pub lazy: bool,
}

impl Images {
    /// Whether images are filled while forks use them.
    pub fn is_lazy(&self) -> bool {
        false
    }

    /// Opens the image of `template`, whose snapshot is in `directory`. Blocks: it may read the whole snapshot.
    pub fn open(&self, template: &str, directory: &Path) -> Result<Opened, Error> {
        let known = self.lock().get(template).cloned();
        let image = match known {
            Some(image) => image,
            None => {
                let image = Arc::new(fill(&Snapshot::open(directory)?)?);
                self.lock().insert(template.to_owned(), image.clone());
                image
            }
        };
        let reader = image.reader().try_clone_to_owned();
        let len = image.len();
        let reader = reader.map_err(|source| image::Error::Create { len, source })?;
        Ok(Opened { reader, lazy: false })
    }

    /// Lets go of a template's image. Its forks keep their pages.
    pub fn forget(&self, template: &str) {
        self.lock().remove(template);
    }

    /// Serves the missing pages of a fork from now on.
    pub fn add_fork(&self, fork: &str, _template: &str, _uffd: OwnedFd, _base: u64, _len: u64) -> Result<(), Error> {
        Err(Error::Eager(fork.to_owned()))
    }

    /// Stops serving a fork.
    pub fn remove_fork(&self, _fork: &str) {}

    /// Fills the rest of a template's image. Blocks.
    pub fn load_all(&self, template: &str) -> Result<(), Error> {
        // Opening an image filled it.
        if self.lock().contains_key(template) { Ok(()) } else { Err(Error::Unknown(template.to_owned())) }
    }

    /// Bytes of a template's image in memory; `None` when it is not loaded.
    pub fn resident_bytes(&self, template: &str) -> Option<u64> {
        let image = self.lock().get(template).cloned()?;
        image.resident_bytes().ok()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Image>>> {
        self.images.lock().expect("no panic under this lock")
    }
}

/// Reads the whole image of a snapshot.
fn fill(snapshot: &Snapshot) -> Result<Image, Error> {
    let image = Image::eager(snapshot.manifest().memory_bytes)?;
    let mut reader = ChunkReader::new()?;
    let mut buffer = [0; CHUNK];
    for chunk in 0..image.chunks() {
        if image.claim(chunk) != Residency::Empty {
            continue;
        }
        let contents = match reader.read(snapshot, chunk, &mut buffer)? {
            ChunkKind::Zero => Contents::Zero,
            ChunkKind::Data => Contents::Data(&buffer),
        };
        image.insert(chunk, contents)?;
    }
    Ok(image)
}
