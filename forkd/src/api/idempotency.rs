//! Replays: a request that comes again with its `Idempotency-Key` gets the answer of the first, which is made once.

use std::{
    collections::{HashMap, VecDeque},
    future::Future,
    sync::{Arc, Mutex},
    time::Instant,
};

use tokio::sync::watch;

use super::{
    error::{Code, Error},
    types::ForkResult,
};
use crate::limits::{IDEMPOTENT_TTL, MAX_IDEMPOTENCY_KEY, MAX_IDEMPOTENT};

type Answer = Result<Arc<Vec<ForkResult>>, Error>;

#[derive(Debug, Default)]
struct Known {
    by_key: HashMap<String, Entry>,
    order: VecDeque<(Instant, String)>,
}

#[derive(Debug)]
struct Entry {
    request: blake3::Hash,
    answer: watch::Receiver<Option<Answer>>,
}

/// Answers by idempotency key.
#[derive(Debug, Default)]
pub struct Replays(Arc<Mutex<Known>>);

impl Replays {
    /// The answer to the request with `key` and what else identifies it; `make` runs for the first of them, to its
    /// end even if its caller goes away. Also says whether the answer is a replay. A refusal is not replayed: the next
    /// request with the key is the first again.
    pub async fn answer<F>(
        &self,
        key: &str,
        request: blake3::Hash,
        make: F,
    ) -> Result<(Arc<Vec<ForkResult>>, bool), Error>
    where
        F: Future<Output = Result<Vec<ForkResult>, Error>> + Send + 'static,
    {
        if key.is_empty() || key.len() > MAX_IDEMPOTENCY_KEY {
            let message = format!("Idempotency-Key has {} bytes, not 1 to {MAX_IDEMPOTENCY_KEY}", key.len());
            return Err(Error::new(Code::InvalidRequest, message));
        }
        let (mut answer, replay) = self.enter(key, request, make)?;
        let settled = answer.wait_for(Option::is_some).await;
        let settled =
            settled.map_err(|_| Error::new(Code::Internal, "the first request with this key was lost"))?;
        Ok((settled.clone().expect("just waited for it")?, replay))
    }

    fn enter<F>(
        &self,
        key: &str,
        request: blake3::Hash,
        make: F,
    ) -> Result<(watch::Receiver<Option<Answer>>, bool), Error>
    where
        F: Future<Output = Result<Vec<ForkResult>, Error>> + Send + 'static,
    {
        let mut known = self.0.lock().expect("no panic under this lock");
        known.forget_old();
        if let Some(entry) = known.by_key.get(key) {
            if entry.request != request {
                let message = format!("Idempotency-Key {key:?} was used for another request");
                return Err(Error::new(Code::IdempotencyConflict, message));
            }
            return Ok((entry.answer.clone(), true));
        }
        let (sender, answer) = watch::channel(None);
        known.by_key.insert(key.to_owned(), Entry { request, answer: answer.clone() });
        known.order.push_back((Instant::now(), key.to_owned()));
        let (all, key) = (self.0.clone(), key.to_owned());
        tokio::spawn(async move {
            let made = make.await.map(Arc::new);
            if made.is_err() {
                all.lock().expect("no panic under this lock").forget(&key);
            }
            sender.send_replace(Some(made));
        });
        Ok((answer, false))
    }
}

impl Known {
    fn forget(&mut self, key: &str) {
        self.by_key.remove(key);
        self.order.retain(|(_, known)| known != key);
    }

    fn forget_old(&mut self) {
        while let Some((since, _)) = self.order.front() {
            if self.order.len() < MAX_IDEMPOTENT && since.elapsed() < IDEMPOTENT_TTL {
                break;
            }
            let (_, key) = self.order.pop_front().expect("just looked at it");
            self.by_key.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests;
