//! The mailbox: one guest-virtual, page-aligned buffer of [`SIZE`] bytes in the agent.
//!
//! The host fills it between the forkpoint and the first instruction of a fork. A fixed [`Header`] that
//! a few bytes of assembly can read (the null guest does) is followed by the postcard encoding of [`Identity`].

use alloc::{string::String, vec::Vec};
use serde::{Deserialize, Serialize};

use crate::network::Network;

/// Size of the mailbox in bytes; four pages.
pub const SIZE: usize = 4 * 4096;

/// Length of a fork id in bytes. Guests prepare for host names of this length, which are the default; another length
/// costs a fork one more system call.
pub const ID_LEN: usize = 15;

/// First eight bytes of a filled mailbox.
pub const MAGIC: u64 = u64::from_le_bytes(*b"FORKLING");

/// Byte offsets of the header's little-endian fields.
pub mod offset {
    /// `u64`, [`super::MAGIC`].
    pub const MAGIC: usize = 0;
    /// `u64`, see [`super::Header::generation`].
    pub const GENERATION: usize = 8;
    /// `u64`, see [`super::Header::nonce`].
    pub const NONCE: usize = 16;
    /// `u64`, see [`super::Header::param`].
    pub const PARAM: usize = 24;
    /// `u64`, see [`super::Header::wall_clock_ns`].
    pub const WALL_CLOCK: usize = 32;
    /// `u32`, length of the encoded identity.
    pub const PAYLOAD_LEN: usize = 40;
    /// `u32`, flags: bit 0 is [`super::Header::prepare`], all others are zero.
    pub const FLAGS: usize = 44;
    /// 64 bytes, see [`super::Header::entropy`].
    pub const ENTROPY: usize = 48;
    /// Start of the encoded identity.
    pub const PAYLOAD: usize = 128;
}

/// The part of the mailbox at fixed offsets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Counts activations on this host; never repeats, never zero.
    pub generation: u64,
    /// Echoed by the acknowledgement.
    pub nonce: u64,
    /// Free for the guest: the null guest writes this many pages.
    pub param: u64,
    /// Wall clock in nanoseconds since 1970 for the fork to begin with; 0 for that of its activation, which the process
    /// of the fork then fills in.
    pub wall_clock_ns: u64,
    /// Fresh random bytes; the agent reseeds the kernel from them.
    pub entropy: [u8; 64],
    /// Not yet an activation: the agent only gives the NIC its place in the network, which takes long, and returns to the
    /// forkpoint. The activation follows there.
    pub prepare: bool,
}

/// What makes one fork different from its siblings, beyond the header.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Fork id as the API shows it.
    pub id: String,
    /// Host name, at most 63 bytes.
    pub hostname: String,
    /// 32 lower-case hex digits for `/etc/machine-id`.
    pub machine_id: String,
    /// Environment added to every command.
    pub env: Vec<(String, String)>,
    /// Its place in the network, if it has a NIC.
    pub network: Option<Network>,
}

/// Why a mailbox cannot be encoded or decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The identity does not fit behind the header.
    TooLarge,
    /// The first bytes are not [`MAGIC`].
    NotFilled,
    /// The payload is not a valid [`Identity`].
    Malformed,
}

impl core::fmt::Display for Error {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::TooLarge => "identity does not fit into the mailbox; shorten its environment",
            Self::NotFilled => "mailbox was not filled by the host",
            Self::Malformed => "identity in the mailbox is malformed",
        })
    }
}

impl core::error::Error for Error {}

/// Encodes header and identity; the result is at most [`SIZE`] bytes and is written at the mailbox's start.
pub fn encode(header: &Header, identity: &Identity) -> Result<Vec<u8>, Error> {
    let payload = postcard::to_allocvec(identity).map_err(|_| Error::Malformed)?;
    if offset::PAYLOAD + payload.len() > SIZE {
        return Err(Error::TooLarge);
    }
    let mut out = alloc::vec![0; offset::PAYLOAD];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(offset::MAGIC, &MAGIC.to_le_bytes());
    put(offset::GENERATION, &header.generation.to_le_bytes());
    put(offset::NONCE, &header.nonce.to_le_bytes());
    put(offset::PARAM, &header.param.to_le_bytes());
    put(offset::WALL_CLOCK, &header.wall_clock_ns.to_le_bytes());
    put(offset::FLAGS, &u32::from(header.prepare).to_le_bytes());
    put(offset::PAYLOAD_LEN, &(payload.len() as u32).to_le_bytes());
    put(offset::ENTROPY, &header.entropy);
    out.extend_from_slice(&payload);
    Ok(out)
}

/// Length of what [`encode`] wrote into the start of `bytes`; at most the length of `bytes`.
pub fn filled_len(bytes: &[u8]) -> usize {
    let length = bytes.get(offset::PAYLOAD_LEN..offset::PAYLOAD_LEN + 4);
    let length = length.map_or(0, |field| u32::from_le_bytes(field.try_into().expect("four bytes")));
    bytes.len().min(offset::PAYLOAD.saturating_add(length as usize))
}

/// Decodes what [`encode`] wrote.
pub fn decode(bytes: &[u8]) -> Result<(Header, Identity), Error> {
    let u64_at = |at: usize| -> Result<u64, Error> {
        let field = bytes.get(at..at + 8).ok_or(Error::Malformed)?;
        Ok(u64::from_le_bytes(field.try_into().expect("eight bytes")))
    };
    if u64_at(offset::MAGIC)? != MAGIC {
        return Err(Error::NotFilled);
    }
    let length = u64_at(offset::PAYLOAD_LEN)? as u32 as usize;
    let payload = bytes.get(offset::PAYLOAD..offset::PAYLOAD + length).ok_or(Error::Malformed)?;
    let entropy = bytes.get(offset::ENTROPY..offset::ENTROPY + 64).ok_or(Error::Malformed)?;
    let header = Header {
        generation: u64_at(offset::GENERATION)?,
        nonce: u64_at(offset::NONCE)?,
        param: u64_at(offset::PARAM)?,
        wall_clock_ns: u64_at(offset::WALL_CLOCK)?,
        entropy: entropy.try_into().expect("sixty-four bytes"),
        prepare: bytes.get(offset::FLAGS).is_some_and(|flags| flags & 1 == 1),
    };
    Ok((header, postcard::from_bytes(payload).map_err(|_| Error::Malformed)?))
}

#[cfg(test)]
mod tests;
