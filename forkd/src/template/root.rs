//! Root images: read-only EROFS without compression or inlined tails, so that the guest maps every file by DAX.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::FileExt,
    path::Path,
};

use forkling_vmm::memory::layout::PMEM_ALIGN;

use super::{scratch::Scratch, tool::Tool};
use crate::{
    api::error::{Code, Error},
    engine::Engine,
    spec::RECIPE,
};

/// What a root is given as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Recipe,
    Directory,
    Tar,
    Erofs,
}

/// Offset and bytes of the EROFS superblock's magic number (kernel documentation, filesystems/erofs).
const EROFS_MAGIC: (usize, [u8; 4]) = (1024, [0xe2, 0xe1, 0xf5, 0xe0]);

/// Offset and bytes that show a tar, plain or compressed.
const TAR_MAGICS: [(usize, &[u8]); 5] =
    [(257, b"ustar"), (0, b"\x1f\x8b"), (0, b"\xfd7zXZ"), (0, b"\x28\xb5\x2f\xfd"), (0, b"BZh")];

/// Packages of the built-in recipe. usr-is-merged instead of usrmerge, which would bring Perl.
const PACKAGES: &str = "usr-is-merged,python3,ca-certificates,curl,iproute2,procps";

/// Suite of the built-in recipe.
const SUITE: &str = "bookworm";

/// Run by mmdebstrap outside the new root, with its path as `$1`: documentation, and what a first boot would change.
const TRIM: &str = r#"
rm -rf "$1"/usr/share/doc/* "$1"/usr/share/man/* "$1"/usr/share/info/* "$1"/usr/share/locale/* "$1"/var/log/*
rm -f "$1"/etc/resolv.conf "$1"/var/lib/dpkg/*-old
find "$1"/usr/lib/python3* -depth -name test -type d -exec rm -rf {} +
: >"$1"/etc/machine-id
echo template >"$1"/etc/hostname
echo "127.0.0.1 localhost" >"$1"/etc/hosts
"#;

/// Says whether `root` can become a root image, before anything is built.
pub fn check(root: &str) -> Result<(), Error> {
    kind(root).map(|_| ())
}

/// Makes the image of `root` in the file `out`, with temporary files in `work`.
pub async fn make(engine: &Engine, root: &str, work: &Path, out: &Path) -> Result<(), Error> {
    match kind(root)? {
        Kind::Recipe => from_recipe(engine, work, out).await,
        Kind::Directory => from_directory(Path::new(root), out).await,
        Kind::Tar => from_tar(Path::new(root), work, out).await,
        Kind::Erofs => copy(Path::new(root).to_owned(), out.to_owned()).await,
    }
}

fn kind(root: &str) -> Result<Kind, Error> {
    if root == RECIPE {
        return Ok(Kind::Recipe);
    }
    let missing = |error: io::Error| {
        Error::new(Code::FileNotFound, format!("the root {root:?} cannot be read")).because(error)
    };
    let metadata = fs::metadata(root).map_err(missing)?;
    if metadata.is_dir() {
        return Ok(Kind::Directory);
    }
    let refused =
        || Error::new(Code::RootNotArchive, format!("the root {root:?} is no directory, archive or image"));
    if !metadata.is_file() {
        return Err(refused());
    }
    let mut head = Vec::new();
    File::open(root).and_then(|file| file.take(2048).read_to_end(&mut head)).map_err(missing)?;
    kind_of_bytes(&head).ok_or_else(refused)
}

fn kind_of_bytes(head: &[u8]) -> Option<Kind> {
    let has = |at: usize, magic: &[u8]| head.get(at..at + magic.len()) == Some(magic);
    if has(EROFS_MAGIC.0, &EROFS_MAGIC.1) {
        Some(Kind::Erofs)
    } else if TAR_MAGICS.iter().any(|&(at, magic)| has(at, magic)) {
        Some(Kind::Tar)
    } else {
        None
    }
}

async fn from_directory(directory: &Path, out: &Path) -> Result<(), Error> {
    const UUID: &str = "00000000-0000-0000-0000-000000000000";
    // noinline_data: the kernel maps only files without an inlined tail by DAX.
    let options = ["--quiet", "-T0", "-U", UUID, "-E", "noinline_data"];
    Tool::as_owner("mkfs.erofs").args(options).args([out, directory]).run("make the root image").await?;
    let out = out.to_owned();
    blocking(move || pad(&File::options().write(true).open(out)?)).await
}

async fn from_tar(tar: &Path, work: &Path, out: &Path) -> Result<(), Error> {
    let tree = work.join("root");
    let made = tree.clone();
    blocking(move || fs::create_dir(made)).await?;
    // Device nodes cannot be made without root and are not needed: the guest has a devtmpfs. tar itself refuses names
    // that leave the tree, and makes symbolic links last.
    let options = [
        "--extract",
        "--numeric-owner",
        "--same-permissions",
        "--anchored",
        "--exclude=./dev/*",
        "--exclude=dev/*",
    ];
    let extract =
        Tool::as_owner("tar").args(options).args([Path::new("--directory"), &tree, Path::new("--file"), tar]);
    extract.run("unpack the root's archive").await?;
    from_directory(&tree, out).await?;
    blocking(move || {
        super::scratch::remove(&tree);
        Ok(())
    })
    .await
}

async fn from_recipe(engine: &Engine, work: &Path, out: &Path) -> Result<(), Error> {
    let key = blake3::hash([SUITE, PACKAGES, TRIM].concat().as_bytes()).to_hex();
    let cached = engine.cache_dir().join(format!("root-{RECIPE}-{}.erofs", &key[..16]));
    if !cached.is_file() {
        let scratch = Scratch::new(&engine.cache_dir()).map_err(|error| {
            Error::new(Code::BuildFailed, "cannot make a temporary directory").because(error)
        })?;
        let (tar, image) = (work.join("root.tar"), scratch.path().join("image"));
        let include = format!("--include={PACKAGES}");
        let hook = format!("--customize-hook={TRIM}");
        let tool = Tool::new("mmdebstrap").env("SOURCE_DATE_EPOCH", "0").args([
            "--variant=essential",
            "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
            &include,
            &hook,
            "--aptopt=Apt::Install-Recommends \"false\"",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
            SUITE,
        ]);
        tool.args([&tar]).run("install the Debian root (mmdebstrap)").await?;
        from_tar(&tar, work, &image).await?;
        let target = cached.clone();
        blocking(move || {
            fs::remove_file(tar)?;
            // Renamed when it is complete, so that two builds at once do no harm.
            fs::rename(image, target)
        })
        .await?;
    }
    copy(cached, out.to_owned()).await
}

/// Copies an image, sharing blocks where the file system can.
async fn copy(from: std::path::PathBuf, to: std::path::PathBuf) -> Result<(), Error> {
    blocking(move || {
        fs::copy(from, &to)?;
        pad(&File::options().write(true).open(to)?)
    })
    .await
}

/// Makes the length a multiple of what the guest can map.
fn pad(image: &File) -> io::Result<()> {
    let len = image.metadata()?.len();
    let padded = len.next_multiple_of(PMEM_ALIGN);
    if padded > len { image.write_all_at(&[0], padded - 1) } else { Ok(()) }
}

async fn blocking(work: impl FnOnce() -> io::Result<()> + Send + 'static) -> Result<(), Error> {
    let failed = |cause: &dyn std::fmt::Display| {
        Error::new(Code::BuildFailed, "cannot write the root image").because(cause)
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome.map_err(|error| failed(&error)),
        Err(error) => Err(failed(&error)),
    }
}

#[cfg(test)]
mod tests;
