//! PID 1 of a Forkling guest.

fn main() {}
