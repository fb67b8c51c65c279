//! The children of one request, made side by side.

use std::{
    future::poll_fn,
    ops::Range,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::task::JoinSet;

use crate::{
    admission::{Granted, Ticket},
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
    /// Places of those that were not admitted and not told of yet.
    refused: Range<usize>,
    refusal: Option<Error>,
}

impl Batch {
    /// Starts the making of the children that were admitted; the others are refused.
    pub fn start(engine: &Arc<Engine>, requests: Vec<Request>, granted: Granted) -> Self {
        let waiting = vec![true; requests.len()];
        let mut children = JoinSet::new();
        let refusal = granted.refusal;
        let refused = granted.tickets.len()..requests.len();
        for (index, (request, ticket)) in requests.into_iter().zip(granted.tickets).enumerate() {
            let engine = engine.clone();
            children.spawn(async move { (index, make(&engine, request, ticket).await) });
        }
        Self { children, waiting, refused, refusal }
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
        if let (Some(error), Some(index)) = (&self.refusal, self.refused.next()) {
            self.waiting[index] = false;
            return Poll::Ready(Some((index, Outcome(Err(error.clone())))));
        }
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
pub async fn make(engine: &Arc<Engine>, request: Request, ticket: Ticket) -> Outcome {
    match fork::create(engine, request).await {
        Ok(fork) => {
            ticket.made();
            Outcome(Ok(Made(Some(fork))))
        }
        Err(error) if error.code == Code::TooManyForks => {
            let after = engine.admission.rates().until_ended(1);
            Outcome(Err(error.retry_after(after)))
        }
        Err(error) => Outcome(Err(error)),
    }
}
