//! Frames between `forkd` and the agent on a vsock stream.
//!
//! A frame is a 12-byte header (payload length `u32`, call `u32`, kind `u8`, three zero bytes; little-endian) and a
//! payload. Calls are numbered by the host and run side by side on one connection. Every call ends with exactly one
//! of [`Kind::Pong`], [`Kind::Exit`], [`Kind::Error`].

use alloc::{string::String, vec::Vec};
use serde::{Deserialize, Serialize};

/// vsock port the agent listens on.
pub const PORT: u32 = 1024;

/// Bytes in a frame header.
pub const HEADER_LEN: usize = 12;

/// Longest payload in bytes.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Host: empty payload, answered by [`Kind::Pong`] with the same payload.
    Ping = 1,
    /// Host: postcard of [`Exec`].
    Exec = 2,
    /// Host: bytes for the command's standard input; empty closes it.
    Stdin = 3,
    /// Host: one byte, the signal for the command's process group.
    Signal = 4,
    /// Host: empty payload. The agent stops at a forkpoint; it answers [`Kind::Pong`] when the guest runs again.
    Freeze = 5,
    /// Agent: answer to [`Kind::Ping`].
    Pong = 0x81,
    /// Agent: bytes of standard output.
    Stdout = 0x82,
    /// Agent: bytes of standard error.
    Stderr = 0x83,
    /// Agent: postcard of [`Exit`]; the call is over and all its output was sent before.
    Exit = 0x84,
    /// Agent: postcard of [`CallError`]; the call is over.
    Error = 0x85,
    /// Agent: postcard of the `u32` process id; the command was started.
    Started = 0x86,
}

impl TryFrom<u8> for Kind {
    type Error = u8;

    fn try_from(value: u8) -> Result<Self, u8> {
        Ok(match value {
            1 => Self::Ping,
            2 => Self::Exec,
            3 => Self::Stdin,
            4 => Self::Signal,
            5 => Self::Freeze,
            0x81 => Self::Pong,
            0x82 => Self::Stdout,
            0x83 => Self::Stderr,
            0x84 => Self::Exit,
            0x85 => Self::Error,
            0x86 => Self::Started,
            other => return Err(other),
        })
    }
}

/// A command to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Program (looked up in `PATH` unless it has a slash) and arguments; never empty.
    pub argv: Vec<String>,
    /// Added to the agent's environment.
    pub env: Vec<(String, String)>,
    /// Working directory; `/` if none.
    pub cwd: Option<String>,
    /// User name or numeric id; root if none. Sets uid, gid, supplementary groups and `HOME`.
    pub user: Option<String>,
    /// Kill the process group after this many milliseconds; 0 for never.
    pub timeout_ms: u64,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// It exited with this status.
    Status(i32),
    /// This signal killed it.
    Signal(i32),
    /// It was killed because its time was over.
    TimedOut,
}

/// Why a call failed before or instead of running to its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CallError {
    /// `argv[0]` was not found or is not executable.
    NotFound(String),
    /// The working directory does not exist.
    NoSuchDirectory(String),
    /// The user does not exist.
    NoSuchUser(String),
    /// The agent does not understand the frame.
    BadRequest(String),
    /// The guest's kernel refused; text of the error.
    System(String),
}

/// A decoded frame header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Length of the payload in bytes, at most [`MAX_PAYLOAD`].
    pub len: u32,
    /// The call the frame belongs to.
    pub call: u32,
    /// What the payload is.
    pub kind: Kind,
}

/// Why bytes are not a frame header. The connection cannot be used further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// Payload longer than [`MAX_PAYLOAD`].
    TooLong(u32),
    /// Unknown kind.
    UnknownKind(u8),
}

impl core::fmt::Display for FrameError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::TooLong(len) => write!(f, "frame of {len} bytes exceeds {MAX_PAYLOAD}"),
            Self::UnknownKind(kind) => write!(f, "unknown frame kind {kind:#x}"),
        }
    }
}

impl core::error::Error for FrameError {}

impl Header {
    /// Encodes the header.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        out[..4].copy_from_slice(&self.len.to_le_bytes());
        out[4..8].copy_from_slice(&self.call.to_le_bytes());
        out[8] = self.kind as u8;
        out
    }

    /// Decodes and validates a header.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, FrameError> {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let len = word(0);
        if len as usize > MAX_PAYLOAD {
            return Err(FrameError::TooLong(len));
        }
        let kind = Kind::try_from(bytes[8]).map_err(FrameError::UnknownKind)?;
        Ok(Self { len, call: word(4), kind })
    }
}

/// Encodes a whole frame around `payload`.
///
/// # Panics
/// When `payload` is longer than [`MAX_PAYLOAD`]; callers split before.
pub fn frame(call: u32, kind: Kind, payload: &[u8]) -> Vec<u8> {
    assert!(payload.len() <= MAX_PAYLOAD, "callers split payloads");
    let header = Header { len: payload.len() as u32, call, kind };
    let mut out = Vec::with_capacity(HEADER_LEN + payload.len());
    out.extend_from_slice(&header.encode());
    out.extend_from_slice(payload);
    out
}

#[cfg(test)]
mod tests;
