//! Unpacks the compressed payload of a bzImage.
//!
//! The kernel's build appends the unpacked size (4 bytes, little endian) to every format but gzip, which has its own;
//! so each decoder reads one stream and leaves what follows it.

use std::io::Read;

/// Most bytes a payload may unpack to.
pub const MAX_UNPACKED: usize = 512 << 20;

/// Magic number of the legacy LZ4 frame, the one `lz4 -l` writes and the kernel's build uses.
const LZ4_LEGACY: [u8; 4] = 0x184C_2102_u32.to_le_bytes();

/// Most bytes one block of a legacy LZ4 frame unpacks to.
const LZ4_BLOCK: usize = 8 << 20;

/// Why a payload cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The format is known but not supported.
    #[error("the kernel is compressed with {0}; use one compressed with gzip, xz, LZ4 or zstd, or a vmlinux")]
    Unsupported(&'static str),
    /// The first bytes belong to no known format.
    #[error("the kernel's payload starts with {0:02x?}, which is no known compression; the file is damaged")]
    Unknown([u8; 4]),
    /// The decoder failed.
    #[error("the kernel's {format} payload is damaged")]
    Damaged {
        /// Compression format.
        format: &'static str,
        /// What the decoder says.
        source: std::io::Error,
    },
    /// More than [`MAX_UNPACKED`] bytes.
    #[error("the kernel unpacks to more than {} MiB; it is damaged or hostile", MAX_UNPACKED >> 20)]
    TooBig,
}

/// Unpacks `payload` by its magic number, to at most [`MAX_UNPACKED`] bytes. An ELF payload is returned as it is.
pub fn unpack(payload: &[u8]) -> Result<Vec<u8>, Error> {
    match payload {
        [0x7F, b'E', b'L', b'F', ..] => Ok(payload.to_vec()),
        [0x1F, 0x8B | 0x9E, ..] => bounded("gzip", flate2::bufread::GzDecoder::new(payload)),
        [0xFD, b'7', b'z', b'X', b'Z', 0, ..] => bounded("xz", lzma_rust2::XzReader::new(payload, false)),
        [0x28, 0xB5, 0x2F, 0xFD, ..] => {
            let decoder = zstd::Decoder::with_buffer(payload).map_err(|source| damaged("zstd", source))?;
            bounded("zstd", decoder.single_frame())
        }
        [a, b, c, d, blocks @ ..] if [*a, *b, *c, *d] == LZ4_LEGACY => lz4_legacy(blocks),
        [b'B', b'Z', b'h', ..] => Err(Error::Unsupported("bzip2")),
        [0x5D, 0, 0, ..] => Err(Error::Unsupported("lzma")),
        [0x89, b'L', b'Z', b'O', ..] => Err(Error::Unsupported("lzo")),
        _ => {
            let mut magic = [0; 4];
            magic.iter_mut().zip(payload).for_each(|(to, from)| *to = *from);
            Err(Error::Unknown(magic))
        }
    }
}

fn damaged(format: &'static str, source: std::io::Error) -> Error {
    Error::Damaged { format, source }
}

fn bounded(format: &'static str, decoder: impl Read) -> Result<Vec<u8>, Error> {
    let mut out = Vec::new();
    decoder.take(MAX_UNPACKED as u64 + 1).read_to_end(&mut out).map_err(|source| damaged(format, source))?;
    if out.len() > MAX_UNPACKED { Err(Error::TooBig) } else { Ok(out) }
}

/// Blocks of a 4-byte length and that many bytes, until the appended size is all that is left.
fn lz4_legacy(mut blocks: &[u8]) -> Result<Vec<u8>, Error> {
    let bad = |what: &str| damaged("LZ4", std::io::Error::new(std::io::ErrorKind::InvalidData, what));
    let mut out = Vec::new();
    let mut block = vec![0; LZ4_BLOCK];
    while blocks.len() > 4 {
        let (len, rest) = blocks.split_first_chunk::<4>().ok_or_else(|| bad("a block has no length"))?;
        if *len == LZ4_LEGACY {
            blocks = rest; // frames may be concatenated
            continue;
        }
        let len = u32::from_le_bytes(*len) as usize;
        let packed = rest.get(..len).ok_or_else(|| bad("a block is longer than the payload"))?;
        let n = lz4_flex::block::decompress_into(packed, &mut block).map_err(|e| bad(&e.to_string()))?;
        if out.len() + n > MAX_UNPACKED {
            return Err(Error::TooBig);
        }
        out.extend_from_slice(&block[..n]);
        blocks = &rest[len..];
    }
    Ok(out)
}

#[cfg(test)]
pub(super) mod tests;
