use std::io::{Seek, Write};

use super::{Digest, FileSum};

#[test]
fn text_form_round_trips() {
    let digest = Digest::of(b"forkling");
    assert_eq!(digest.to_string().parse(), Ok(digest));
    assert_eq!(digest.to_string().len(), 64);
}

#[test]
fn refuses_everything_that_is_not_a_digest() {
    let good = Digest::of(b"").to_string();
    let with_path = format!("../{}", &good[3..]);
    let upper = good.to_uppercase();
    let long = format!("{good}0");
    for text in ["", "..", "/etc/passwd", &good[1..], &long, &upper, &with_path, &"\0".repeat(64)] {
        assert!(text.parse::<Digest>().is_err(), "{text:?}");
    }
}

#[test]
fn file_and_bytes_agree() {
    let bytes: Vec<u8> = (0..700_000_u32).map(|i| (i % 251) as u8).collect();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&bytes).unwrap();
    file.rewind().unwrap();
    assert_eq!(FileSum::of_file(&file).unwrap(), FileSum::of_bytes(&bytes));
}
