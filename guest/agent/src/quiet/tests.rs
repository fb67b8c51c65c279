use super::*;

#[test]
fn parents_of_processes_with_odd_names() {
    assert_eq!(parent("12 (kworker/0:1) I 2 0 0 0"), Some(2));
    assert_eq!(parent("77 (a) R 2 (b) c) S 41 77 77"), Some(41));
    assert_eq!(parent(""), None);
    assert_eq!(parent("12 (x) S"), None);
}

#[test]
fn neither_the_agent_nor_kernel_threads_are_programs() {
    assert!(!is_program("2"));
    assert!(!is_program(&std::process::id().to_string()));
    assert!(!is_program("999999999"), "gone");
}

#[test]
fn frozen_is_what_the_kernel_says() {
    assert!(is_frozen("populated 1\nfrozen 1\n"));
    assert!(!is_frozen("populated 1\nfrozen 0\n"));
    assert!(!is_frozen(""));
}
