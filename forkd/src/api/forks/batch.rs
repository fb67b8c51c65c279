//! The children of one request, made side by side.

use std::{
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::task::JoinSet;

use crate::{
    api::{
        error::{Code, Error},
        types::ForkResult,
    },
    engine::Engine,
    fork::{self, Fork, Request},
};

/// A fork that is killed unless it is handed out.
struct Made(Option<Arc<Fork>>);

impl Made {
    fn hand_out(mut self) -> Arc<Fork> {
        self.0.take().expect("handed out once")
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if let Some(fork) = self.0.take() {
            fork.kill("killed", "the caller went away before it was handed out");
        }
    }
}

/// What became of a child that was not handed out yet. Dropped, it is killed.
pub struct Outcome(Result<Made, Error>);

impl Outcome {
    /// Hands it out.
    pub fn hand_out(self) -> ForkResult {
        match self.0 {
            Ok(made) => ForkResult::Fork(Box::new(made.hand_out().info())),
            Err(error) => ForkResult::Error(error.body()),
        }
    }

    /// Why there is none.
    pub fn error(&self) -> Option<&Error> {
        self.0.as_ref().err()
    }
}

/// Children under way. Dropped, it ends the making of those not ready, and those that are die with their outcomes.
pub struct Batch {
    children: JoinSet<(usize, Outcome)>,
    /// Which of them have no outcome yet.
    waiting: Vec<bool>,
}

impl Batch {
    /// Starts the making of all.
    pub fn start(engine: &Arc<Engine>, requests: Vec<Request>) -> Self {
        let waiting = vec![true; requests.len()];
        let mut children = JoinSet::new();
        for (index, request) in requests.into_iter().enumerate() {
            let engine = engine.clone();
            children.spawn(async move { (index, make(&engine, request).await) });
        }
        Self { children, waiting }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// The next child that is ready, and its place in the request; `None` after the last.
    pub async fn next(&mut self) -> Option<(usize, Outcome)> {
        poll_fn(|context| self.poll_next(context)).await
    }

    /// See [`Self::next`].
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<(usize, Outcome)>> {
        let next = loop {
            match ready!(self.children.poll_join_next(context)) {
                Some(Ok(child)) => break Some(child),
                // Which one it was is known when all others are there.
                Some(Err(_)) => {}
                None => break self.waiting.iter().position(|&waiting| waiting).map(lost),
            }
        };
        if let Some((index, _)) = &next {
            self.waiting[*index] = false;
        }
        Poll::Ready(next)
    }
}

fn lost(index: usize) -> (usize, Outcome) {
    (index, Outcome(Err(Error::new(Code::Internal, "the fork's task was lost"))))
}

/// Makes one child.
pub async fn make(engine: &Arc<Engine>, request: Request) -> Outcome {
    Outcome(fork::create(engine, request).await.map(|fork| Made(Some(fork))))
}
