use super::*;

#[test]
fn accepts_names() {
    for name in ["a", "0", "debian", "py3.12-slim_x", "f-abc", &"x".repeat(63)] {
        assert_eq!(validate(name), Ok(()), "{name}");
    }
}

#[test]
fn refuses_everything_that_could_be_a_path_or_a_trick() {
    assert_eq!(validate(""), Err(Error::Empty));
    assert_eq!(validate(&"x".repeat(300)), Err(Error::TooLong(300)));
    assert_eq!(validate("../x"), Err(Error::Character('.', 0)));
    assert_eq!(validate("a/b"), Err(Error::Character('/', 1)));
    assert_eq!(validate("a\0b"), Err(Error::Character('\0', 1)));
    assert_eq!(validate("A"), Err(Error::Character('A', 0)));
    assert_eq!(validate("-n"), Err(Error::Character('-', 0)));
    assert_eq!(validate("a..b"), Err(Error::Dots));
    assert_eq!(validate("ä"), Err(Error::Character('ä', 0)));
    assert_eq!(validate("a\n"), Err(Error::Character('\n', 1)));
}
