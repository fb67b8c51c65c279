//! Kernel structures in `state.json`: plain old data as one lower-case hex string.
//!
//! ```text
//! #[derive(Serialize, Deserialize)]
//! #[serde(deny_unknown_fields)]
//! struct VcpuState {
//!     #[serde(with = "blob")]
//!     regs: kvm_regs,
//!     #[serde(with = "blob::list")]
//!     msrs: Vec<kvm_msr_entry>,
//!     #[serde(with = "blob::bytes")]
//!     xsave: Vec<u8>,
//! }
//! ```
//!
//! A string of the wrong length is refused: a structure that grew is another snapshot format, not something to pad.

use std::fmt;

use serde::de::{self, Deserializer, Visitor};
use serde::ser::Serializer;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Serializes one structure.
pub fn serialize<T, S>(value: &T, serializer: S) -> Result<S::Ok, S::Error>
where
    T: IntoBytes + Immutable,
    S: Serializer,
{
    serializer.serialize_str(&hex::encode(value.as_bytes()))
}

/// Deserializes one structure; the string must have exactly its size.
pub fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: FromBytes,
    D: Deserializer<'de>,
{
    let bytes = deserializer.deserialize_str(HexVisitor)?;
    T::read_from_bytes(&bytes).map_err(|_| wrong_length(bytes.len(), size_of::<T>()))
}

/// A `Vec` of structures, back to back in one string.
pub mod list {
    use super::{Deserializer, FromBytes, HexVisitor, Immutable, IntoBytes, Serializer, wrong_length};

    /// Serializes the list.
    pub fn serialize<T, S>(values: &[T], serializer: S) -> Result<S::Ok, S::Error>
    where
        T: IntoBytes + Immutable,
        S: Serializer,
    {
        serializer.serialize_str(&hex::encode(values.as_bytes()))
    }

    /// Deserializes the list; the string must be a whole number of structures.
    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
    where
        T: FromBytes,
        D: Deserializer<'de>,
    {
        const { assert!(size_of::<T>() > 0) };
        let bytes = deserializer.deserialize_str(HexVisitor)?;
        let records = bytes.chunks_exact(size_of::<T>());
        if !records.remainder().is_empty() {
            return Err(wrong_length(bytes.len(), size_of::<T>()));
        }
        let decode = |record| T::read_from_bytes(record).expect("chunks have the exact size");
        Ok(records.map(decode).collect())
    }
}

/// Bytes of any length.
pub mod bytes {
    use super::{Deserializer, HexVisitor, Serializer};

    /// Serializes the bytes.
    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(bytes))
    }

    /// Deserializes the bytes.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        deserializer.deserialize_str(HexVisitor)
    }
}

fn wrong_length<E: de::Error>(found: usize, size: usize) -> E {
    E::custom(format_args!("{found} bytes of hex where structures of {size} bytes were expected"))
}

/// Decodes a hex string, borrowed or owned.
struct HexVisitor;

impl Visitor<'_> for HexVisitor {
    type Value = Vec<u8>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string of lower-case hex digits")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Vec<u8>, E> {
        let refused = || E::invalid_value(de::Unexpected::Other("text that is not lower-case hex"), &self);
        let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return Err(refused()) };
        // Twenty kilobytes in every cold start: all is decoded before it is looked whether that was possible.
        let mut wrong = 0;
        let decode = |&[high, low]: &[u8; 2]| {
            let (high, low) = (VALUES[usize::from(high)], VALUES[usize::from(low)]);
            wrong |= high | low;
            high << 4 | low
        };
        let bytes = pairs.iter().map(decode).collect();
        if wrong & NO_DIGIT == 0 { Ok(bytes) } else { Err(refused()) }
    }
}

/// Values of hex digits by their code; [`NO_DIGIT`] of all else.
const VALUES: [u8; 256] = {
    let mut values = [NO_DIGIT; 256];
    let mut value = 0;
    while value < 16 {
        values[b"0123456789abcdef"[value] as usize] = value as u8;
        value += 1;
    }
    values
};

const NO_DIGIT: u8 = 0x80;

#[cfg(test)]
mod tests;
