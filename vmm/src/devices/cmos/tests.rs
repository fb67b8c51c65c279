use super::*;

#[test]
fn registers_show_the_date() {
    // 2026-11-20 18:54:53 UTC, a Friday.
    let now = 1_795_200_893;
    let shown = [0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32].map(|index| register(index, now));
    assert_eq!(shown, [0x53, 0x54, 0x18, 0x06, 0x20, 0x11, 0x26, 0x20]);
}

#[test]
fn leap_days_are_right() {
    assert_eq!(civil(0), (1970, 1, 1));
    assert_eq!(civil(11_016), (2000, 2, 29));
    assert_eq!(civil(11_017), (2000, 3, 1));
    assert_eq!(civil(19_782), (2024, 2, 29));
    assert_eq!(civil(47_540), (2100, 2, 28));
    assert_eq!(civil(47_541), (2100, 3, 1));
}

#[test]
fn never_updating_and_always_valid() {
    let mut cmos = Cmos::default();
    cmos.write(INDEX_PORT, 0x8A);
    assert_eq!(cmos.read(DATA_PORT) & 0x80, 0);
    cmos.write(INDEX_PORT, 0x0D);
    assert_eq!(cmos.read(DATA_PORT), 0x80);
    cmos.write(INDEX_PORT, 0x40);
    assert_eq!(cmos.read(DATA_PORT), 0);
}

#[test]
fn restores_what_it_saved_and_nothing_else() {
    let mut cmos = Cmos::default();
    cmos.write(INDEX_PORT, 0xFF);
    let state = cmos.save();
    assert_eq!(state.index, 0x7F);
    assert_eq!(Cmos::restore(&state).unwrap().save(), state);
    assert!(Cmos::restore(&CmosState { index: 0x80 }).is_err());
}
