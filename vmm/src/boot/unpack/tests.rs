//! Every compression a kernel may have, each as the kernel's build writes it: one stream, then the unpacked size.

use std::io::Write;

use super::*;

/// An ELF magic number and `len` bytes that compress somewhat.
fn image(len: u32) -> Vec<u8> {
    let mut image = b"\x7FELF".to_vec();
    image.extend((0..len).map(|n: u32| (n.wrapping_mul(2_654_435_761) >> 29) as u8));
    image
}

fn with_size(mut packed: Vec<u8>, image: &[u8]) -> Vec<u8> {
    packed.extend((image.len() as u32).to_le_bytes());
    packed
}

fn gzip(image: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(image).unwrap();
    encoder.finish().unwrap()
}

pub(in crate::boot) fn lz4(image: &[u8]) -> Vec<u8> {
    let mut packed = LZ4_LEGACY.to_vec();
    for block in image.chunks(LZ4_BLOCK) {
        let block = lz4_flex::block::compress(block);
        packed.extend((block.len() as u32).to_le_bytes());
        packed.extend(block);
    }
    with_size(packed, image)
}

fn xz(image: &[u8]) -> Vec<u8> {
    let mut encoder = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(0)).unwrap();
    encoder.write_all(image).unwrap();
    with_size(encoder.finish().unwrap(), image)
}

fn zstd(image: &[u8]) -> Vec<u8> {
    with_size(zstd::encode_all(image, 1).unwrap(), image)
}

#[test]
fn each_compression_gives_the_image_back() {
    // More than one LZ4 block.
    let image = image(9 << 20);
    for (name, packed) in [
        ("none", image.clone()),
        ("gzip", gzip(&image)),
        ("lz4", lz4(&image)),
        ("xz", xz(&image)),
        ("zstd", zstd(&image)),
    ] {
        let unpacked = unpack(&packed).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(unpacked == image, "{name}: another image of {} bytes", unpacked.len());
    }
}

#[test]
fn damage_is_an_error_and_not_a_panic() {
    let image = image(100 << 10);
    for packed in [gzip(&image), lz4(&image), xz(&image), zstd(&image)] {
        let half = &packed[..packed.len() / 2];
        assert!(matches!(unpack(half), Err(Error::Damaged { .. })), "{:02x?}", &packed[..4]);
        for at in (4..packed.len()).step_by(packed.len() / 50) {
            let mut flipped = packed.clone();
            flipped[at] ^= 0x55;
            let _ = unpack(&flipped);
        }
    }
}

#[test]
fn what_is_not_supported_is_named() {
    assert!(matches!(unpack(b"BZh91AY"), Err(Error::Unsupported("bzip2"))));
    assert!(matches!(unpack(&[0x89, b'L', b'Z', b'O', 0]), Err(Error::Unsupported("lzo"))));
    assert!(matches!(unpack(&[0x5D, 0, 0, 0x80]), Err(Error::Unsupported("lzma"))));
    assert!(matches!(unpack(b"ab"), Err(Error::Unknown([b'a', b'b', 0, 0]))));
}

#[test]
fn a_bomb_is_refused() {
    let zeros = std::io::repeat(0).take(MAX_UNPACKED as u64 + 1);
    let packed = zstd::encode_all(zeros, 1).unwrap();
    assert!(matches!(unpack(&packed), Err(Error::TooBig)));
}
