use super::*;

#[test]
fn kinds_are_told_by_their_bytes() {
    let mut erofs = vec![0; 2048];
    erofs[1024..1028].copy_from_slice(&EROFS_MAGIC.1);
    assert_eq!(kind_of_bytes(&erofs), Some(Kind::Erofs));
    let mut tar = vec![0; 512];
    tar[257..262].copy_from_slice(b"ustar");
    assert_eq!(kind_of_bytes(&tar), Some(Kind::Tar));
    assert_eq!(kind_of_bytes(b"\x1f\x8b\x08"), Some(Kind::Tar));
    assert_eq!(kind_of_bytes(b"\x7fELF"), None);
    assert_eq!(kind_of_bytes(b""), None);
}

#[test]
fn what_is_no_root_is_refused_with_its_code() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("x");
    fs::write(&file, "no archive").unwrap();
    assert_eq!(check(file.to_str().unwrap()).unwrap_err().code, Code::RootNotArchive);
    assert_eq!(check("/nonexistent/root").unwrap_err().code, Code::FileNotFound);
    assert_eq!(check("/dev/null").unwrap_err().code, Code::RootNotArchive);
    assert!(check(directory.path().to_str().unwrap()).is_ok());
    assert!(check("debian").is_ok());
}

#[tokio::test]
async fn a_tar_becomes_an_image_that_is_padded_and_readable() {
    let directory = tempfile::tempdir().unwrap();
    let (tree, work) = (directory.path().join("tree"), directory.path().join("work"));
    fs::create_dir_all(tree.join("etc")).unwrap();
    fs::create_dir(&work).unwrap();
    fs::write(tree.join("etc/hostname"), "template\n").unwrap();
    let tar = directory.path().join("root.tar");
    Tool::new("tar")
        .args([Path::new("-C"), &tree, Path::new("-cf"), &tar, Path::new(".")])
        .run("pack")
        .await
        .unwrap();
    let out = directory.path().join("root.erofs");
    from_tar(&tar, &work, &out).await.unwrap();
    assert_eq!(check(out.to_str().unwrap()), Ok(()));
    assert_eq!(kind(out.to_str().unwrap()), Ok(Kind::Erofs));
    assert!(fs::metadata(&out).unwrap().len().is_multiple_of(PMEM_ALIGN));
    assert!(!work.join("root").exists());
}
