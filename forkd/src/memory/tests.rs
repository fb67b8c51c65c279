use super::*;

const SMAPS: &str = "\
7f0000000000-7f0000400000 rw-p 00000000 00:01 7 /memfd:forkling-image (deleted)
Rss:                 400 kB
Private_Dirty:       300 kB
7f0000400000-7f0000500000 rw-p 00400000 00:01 7 /memfd:forkling-image (deleted)
Private_Dirty:        30 kB
55d000000000-55d000100000 r-xp 00000000 08:01 9 /usr/bin/forkling-vmm
Rss:                 800 kB
Private_Clean:         4 kB
Private_Dirty:         8 kB
Swap:                 16 kB
SwapPss:              16 kB
VmFlags: rd ex mr mw me
";

#[test]
fn the_guests_memory_is_told_from_the_rest() {
    let guest = vec![0x7f00_0000_0000..0x7f00_0040_0000, 0x7f00_0040_0000..0x7f00_0050_0000];
    assert_eq!(Mapped::parse(SMAPS), Mapped { guest, private_kib: 28 });
}

#[test]
fn a_process_without_an_image_is_no_fork() {
    let own = std::process::id().cast_signed();
    assert_eq!(of(own).unwrap_err().kind(), io::ErrorKind::NotFound);
    assert_eq!(of(i32::MAX).unwrap_err().kind(), io::ErrorKind::NotFound);
}
