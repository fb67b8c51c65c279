//! Copies look like their originals, and no link leads out of the root.

use std::os::unix::fs::symlink;
use std::time::{Duration, SystemTime};

use super::*;

/// A root with `usr/lib/libc.so.6`, reached by two links that are absolute.
fn root() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let library = root.path().join("usr/lib/real.so");
    fs::create_dir_all(library.parent().unwrap()).unwrap();
    fs::write(&library, "code").unwrap();
    fs::set_permissions(&library, Permissions::from_mode(0o755)).unwrap();
    symlink("/usr/lib", root.path().join("lib")).unwrap();
    symlink("/../lib/real.so", root.path().join("usr/lib/libc.so.6")).unwrap();
    let long_ago = FileTimes::new().set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(86_400));
    for path in ["usr/lib/real.so", "usr/lib", "usr"] {
        File::open(root.path().join(path)).unwrap().set_times(long_ago).unwrap();
    }
    fs::set_permissions(root.path().join("usr"), Permissions::from_mode(0o711)).unwrap();
    root
}

#[test]
fn links_are_followed_inside_of_the_root() {
    let root = root();
    let root = root.path().canonicalize().unwrap();
    assert_eq!(resolve(&root, Path::new("/lib/libc.so.6")).unwrap(), Path::new("/usr/lib/real.so"));
    assert!(resolve(&root, Path::new("/etc/hostname")).is_err(), "that is the host's");
}

#[test]
fn a_copy_and_its_directories_look_like_the_originals() {
    let (root, layer) = (root(), tempfile::tempdir().unwrap());
    copy(root.path(), layer.path(), Path::new("/usr/lib/real.so")).unwrap();
    for path in ["usr", "usr/lib", "usr/lib/real.so"] {
        let look = |root: &Path| {
            let metadata = fs::metadata(root.join(path)).unwrap();
            (metadata.mode(), metadata.uid(), metadata.gid(), metadata.mtime())
        };
        assert_eq!(look(layer.path()), look(root.path()), "{path}");
    }
    assert_eq!(fs::read(layer.path().join("usr/lib/real.so")).unwrap(), b"code");
}

#[test]
fn what_has_extended_attributes_is_left_where_it_is() {
    let (root, layer) = (root(), tempfile::tempdir().unwrap());
    let library = root.path().join("usr/lib/real.so");
    // A tmpfs had no names of users before Linux 6.6, and only root may use trusted ones.
    let set = |name| rustix::fs::setxattr(&library, name, b"x", rustix::fs::XattrFlags::empty()).is_ok();
    assert!(set("user.note") || set("trusted.note"));
    assert!(copy(root.path(), layer.path(), Path::new("/usr/lib/real.so")).is_err());
}
