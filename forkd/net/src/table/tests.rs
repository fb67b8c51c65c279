use super::*;

#[test]
fn a_key_dies_with_its_value() {
    let mut table = Table::default();
    let expected = table.next_key();
    let first = table.insert('a');
    assert_eq!(first, expected);
    assert_eq!(table.remove(first), Some('a'));
    let second = table.insert('b');
    assert_ne!(first, second);
    assert_eq!((table.get(first), table.get(second), table.len()), (None, Some(&'b'), 1));
    assert_eq!(table.remove(first), None);
    assert_eq!(Key::of(second.token(Kind::Flow)), (Kind::Flow, second));
}
