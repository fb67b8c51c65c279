use super::*;

#[test]
fn keeps_the_last_bytes_and_counts_the_rest() {
    let mut console = Console::default();
    console.push(b"first");
    assert_eq!(console.contents(), (b"first".to_vec(), 0));
    console.push(&vec![b'x'; CONSOLE_RING]);
    console.push(b"end");
    let (bytes, dropped) = console.contents();
    assert_eq!(bytes.len(), CONSOLE_RING);
    assert!(bytes.ends_with(b"xend"));
    assert_eq!(dropped, 8);
}
