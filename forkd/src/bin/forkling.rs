//! The `forkling` program.
fn main() {}
