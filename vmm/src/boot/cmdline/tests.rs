//! Own words are appended, and only words a kernel can take.

use super::*;

#[test]
fn own_words_come_last() {
    let line = build("  foo=1 loglevel=7 ").unwrap();
    assert!(line.starts_with("console=ttyS0 "));
    assert!(line.ends_with(" foo=1 loglevel=7"));
    assert!(!build("").unwrap().ends_with(' '));
}

#[test]
fn control_characters_and_other_alphabets_are_refused() {
    for (words, at, found) in [("a\nb", 1, '\n'), ("\0", 0, '\0'), ("ab\u{e9}", 2, '\u{e9}'), ("\t", 0, '\t')]
    {
        assert_eq!(build(words), Err(Error::NotPrintable { at, found }));
    }
}

#[test]
fn length_is_limited_with_the_built_in_words() {
    let room = MAX - build("").unwrap().len() - 1;
    assert_eq!(build(&"x".repeat(room)).unwrap().len(), MAX);
    assert_eq!(build(&"x".repeat(room + 1)), Err(Error::TooLong(MAX + 1)));
}
