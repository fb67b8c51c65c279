use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;

use super::SealedMemory;

const LEN: u64 = 1 << 20;

fn page_at(memory: &SealedMemory, offset: u64) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    File::from(memory.reader().try_clone_to_owned().unwrap()).read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn allocates_what_is_written() {
    let memory = SealedMemory::new("test", LEN).unwrap();
    assert_eq!(memory.allocated_bytes().unwrap(), 0);
    memory.write(8192, &[7; 4096]);
    assert_eq!(memory.allocated_bytes().unwrap(), 4096);
    assert_eq!(page_at(&memory, 8192), [7; 4096]);
    assert_eq!(page_at(&memory, 0), [0; 4096]);
}

#[test]
#[should_panic(expected = "outside")]
fn writes_past_the_end_are_refused() {
    SealedMemory::new("test", LEN).unwrap().write(LEN - 1, &[0; 2]);
}

/// Whoever has the descriptor, or opens it again for writing, cannot change a byte or the length.
#[test]
fn nobody_else_can_change_it() {
    let memory = SealedMemory::new("test", LEN).unwrap();
    memory.write(0, &[7; 4096]);
    let path = format!("/proc/self/fd/{}", memory.reader().as_raw_fd());
    let reopened = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();

    assert_eq!(rustix::io::pwrite(&reopened, b"x", 0), Err(Errno::PERM));
    assert_eq!(rustix::fs::ftruncate(&reopened, 0), Err(Errno::PERM));
    assert_eq!(rustix::fs::ftruncate(&reopened, 2 * LEN), Err(Errno::PERM));
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    assert_eq!(rustix::fs::fallocate(&reopened, punch, 0, 4096), Err(Errno::PERM));
    assert_eq!(rustix::fs::fcntl_add_seals(&reopened, SealFlags::WRITE), Err(Errno::PERM));
    let reopened = File::from(reopened);
    let error = memmap2::MmapRaw::map_raw(&reopened).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EPERM));

    assert_eq!(page_at(&memory, 0), [7; 4096]);
    // The one writable mapping still works.
    memory.write(0, &[8; 4096]);
    assert_eq!(page_at(&memory, 0), [8; 4096]);
}
