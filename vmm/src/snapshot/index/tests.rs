use super::super::{Damage, Error};
use super::{Digest, Index};

fn digest(n: u8) -> Digest {
    Digest::of(&[n])
}

fn sample() -> Index {
    let [a, b, c] = [1, 2, 3].map(|n| Some(digest(n)));
    Index::new([None, None, a, b, c, None, a, a, b, None])
}

#[test]
fn counts_and_contents() {
    let index = sample();
    assert_eq!((index.chunks(), index.data_chunks(), index.unique_chunks()), (10, 6, 3));
    assert_eq!(index.get(0), None);
    assert_eq!(index.get(4), Some(digest(3)));
    assert_eq!(index.get(7), Some(digest(1)));
}

#[test]
fn survives_a_round_trip() {
    for index in [sample(), Index::new([]), Index::new([None; 5]), Index::new([Some(digest(9)); 5])] {
        let bytes = index.encode();
        assert!(bytes.len() as u64 <= Index::encoded_limit(index.chunks(), index.unique_chunks()));
        assert_eq!(Index::decode(&bytes).unwrap(), index);
    }
}

#[test]
fn memory_without_repetition_is_short() {
    let chunks = (0..4096_u32).map(|n| (n % 2048 > 1000).then(|| Digest::of(&n.to_le_bytes())));
    let index = Index::new(chunks);
    assert_eq!(index.encode().len() as u64, 16 + 32 * index.unique_chunks() + 4 * 8);
}

/// The encoding of format 1, byte by byte; a change needs another format number.
#[test]
fn encoding_is_pinned() {
    let index = Index::new([None, None, Some(Digest([0xAB; 32]))]);
    let mut expected = vec![3, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
    expected.extend([0xAB; 32]);
    expected.extend([2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(index.encode(), expected);
}

#[test]
fn refuses_malformed_bytes() {
    let good = sample().encode();
    for cut in 0..good.len() {
        let error = Index::decode(&good[..cut]).unwrap_err();
        assert!(
            matches!(error, Error::Damaged { damage: Damage::Structure(_), .. }),
            "cut at {cut}: {error}"
        );
    }
    let runs = 16 + 3 * 32;
    let with = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes
    };
    for (at, byte) in
        [(0, 11), (0, 9), (3, 1), (8, 4), (8, 2), (runs, 3), (runs, 0), (runs + 4, 200), (runs + 12, 3)]
    {
        Index::decode(&with(at, byte)).expect_err(&format!("byte {at} = {byte}"));
    }
    Index::decode(&[good.as_slice(), &[1, 0, 0, 0, 0, 0, 0, 0]].concat()).expect_err("one run too many");
}

/// No input makes the decoder panic or allocate without bound.
#[test]
fn any_bytes_are_survived() {
    let good = sample().encode();
    for at in 0..good.len() {
        for flip in 0..8 {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << flip;
            let _ = Index::decode(&bytes);
        }
    }
    let _ = Index::decode(&[0xFF; 64]);
}
