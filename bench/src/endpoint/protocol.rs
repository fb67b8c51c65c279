//! What both ends of a measured connection agree on. The side that connects says what it wants in one byte.

/// It sends [`BULK`] bytes and reads one.
pub const SEND: u8 = b's';

/// It reads [`BULK`] bytes and sends one.
pub const RECEIVE: u8 = b'r';

/// It sends every byte back that it reads, until the end.
pub const ECHO: u8 = b'e';

/// It wants nothing any more.
pub const DONE: u8 = b'q';

/// Bytes of one bulk transfer.
pub const BULK: usize = 8 << 20;

/// Bytes handed to the kernel at a time, as iperf3 does it.
pub const PIECE: usize = 128 << 10;
