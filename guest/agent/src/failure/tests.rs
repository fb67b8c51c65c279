use super::*;
use crate::command;

#[test]
fn causes_follow_in_one_line() {
    let source = std::io::Error::other("no memory");
    let error = command::Error::System { program: "make".into(), source };
    assert_eq!(chain(&error), "cannot start make: no memory");
}
