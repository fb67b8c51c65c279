//! What a library makes of a stranger's bytes is not the end of the process. A program of its own, for the hook is
//! the whole process's.

use forkling_vmm::{abort_on_panic, contain_panic};

#[test]
fn a_contained_panic_is_not_the_end_of_the_process() {
    abort_on_panic();
    assert_eq!(contain_panic(|| 1), Some(1));
    let broken: Option<()> = contain_panic(|| panic!("a parser gave up"));
    assert_eq!(broken, None);
    let inner = contain_panic(|| contain_panic(|| panic!("within another")).is_none_or(|()| false));
    assert_eq!(inner, Some(true));
}
