use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

fn request(text: &str) -> blake3::Hash {
    blake3::hash(text.as_bytes())
}

#[tokio::test]
async fn the_same_request_is_made_once() {
    let (replays, made) = (Replays::default(), Arc::new(AtomicU32::new(0)));
    let make = || {
        let made = made.clone();
        async move {
            made.fetch_add(1, Ordering::Relaxed);
            Ok(vec![ForkResult::Error(Error::new(Code::ForkFailed, "x").body())])
        }
    };
    let (first, second) =
        tokio::join!(replays.answer("k", request("a"), make()), replays.answer("k", request("a"), make()));
    let ((first, a), (second, b)) = (first.unwrap(), second.unwrap());
    assert!(Arc::ptr_eq(&first, &second));
    assert_eq!((a, b), (false, true));
    assert_eq!(made.load(Ordering::Relaxed), 1);
    let conflict = replays.answer("k", request("b"), make()).await.unwrap_err();
    assert_eq!(conflict.code, Code::IdempotencyConflict);
    assert!(!replays.answer("other", request("b"), make()).await.unwrap().1);
}

#[tokio::test]
async fn keys_have_a_length() {
    let replays = Replays::default();
    for key in ["", &"k".repeat(MAX_IDEMPOTENCY_KEY + 1)] {
        let refused = replays.answer(key, request("a"), async { Ok(Vec::new()) }).await.unwrap_err();
        assert_eq!(refused.code, Code::InvalidRequest);
    }
}

#[tokio::test]
async fn a_refusal_is_not_replayed() {
    let replays = Replays::default();
    let refuse = async { Err(Error::new(Code::HostFull, "x")) };
    assert_eq!(replays.answer("k", request("a"), refuse).await.unwrap_err().code, Code::HostFull);
    assert!(!replays.answer("k", request("a"), async { Ok(Vec::new()) }).await.unwrap().1);
    let refuse = async { Err(Error::new(Code::HostFull, "x")) };
    assert!(replays.answer("k", request("a"), refuse).await.unwrap().1);
}
