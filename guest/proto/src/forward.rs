//! The beginning of a vsock stream that the agent joins with a TCP port of the guest's loopback.
//!
//! The host sends the port (`u16`, little-endian), and its own bytes right behind if it likes; the agent answers with one
//! byte, a [`Verdict`]. From there on both directions are the guest server's.

/// vsock port on which the agent takes such streams.
pub const PORT: u32 = 1025;

/// Bytes before the host's own.
pub const HEADER_LEN: usize = 2;

/// What became of the connection to the guest's port. After all but the first, the stream is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Verdict {
    /// It is there.
    Connected = 0,
    /// Nobody listens on the port, neither on 127.0.0.1 nor on ::1.
    Closed = 1,
    /// The guest's kernel refused for another reason, or there are too many streams.
    Failed = 2,
}

impl TryFrom<u8> for Verdict {
    type Error = u8;

    fn try_from(value: u8) -> Result<Self, u8> {
        Ok(match value {
            0 => Self::Connected,
            1 => Self::Closed,
            2 => Self::Failed,
            other => return Err(other),
        })
    }
}

/// The bytes that ask for guest port `port`.
pub fn header(port: u16) -> [u8; HEADER_LEN] {
    port.to_le_bytes()
}

/// The port a header asks for.
pub fn port(header: [u8; HEADER_LEN]) -> u16 {
    u16::from_le_bytes(header)
}
