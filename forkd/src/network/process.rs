//! The net process and the task that talks to it.

use std::{collections::HashMap, os::fd::AsFd, sync::Arc, time::Duration};

use forkling_net::control::{FromNet, Report, ToNet};
use tokio::{
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};

use super::{Bound, Error, Order, Shared};
use crate::{
    control::{self, Socket},
    process::{Doomed, Spawner},
};

/// Longest start of the net process.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// Between the death of a net process and the start of the next.
const RESTART_PAUSE: Duration = Duration::from_millis(100);

/// Starts the net process, and the task that keeps it for as long as the daemon lives.
pub async fn start(spawner: Spawner, shared: Arc<Shared>) -> Result<mpsc::UnboundedSender<Order>, Error> {
    let running = Running::start(&spawner, &shared).await?;
    let (sender, orders) = mpsc::unbounded_channel();
    tokio::spawn(keep(spawner, shared, orders, running));
    Ok(sender)
}

/// Serves orders; starts the process anew when it dies.
async fn keep(
    spawner: Spawner,
    shared: Arc<Shared>,
    mut orders: mpsc::UnboundedReceiver<Order>,
    mut running: Running,
) {
    loop {
        let Some(cause) = running.serve(&shared, &mut orders).await else { return };
        tracing::error!(cause, "the net process is gone; connections of forks are reset");
        drop(running);
        running = loop {
            sleep(RESTART_PAUSE).await;
            match Running::restart(&spawner, &shared).await {
                Ok(running) => break running,
                Err(error) => tracing::error!(%error, "the net process cannot be started"),
            }
        };
    }
}

/// A net process that serves.
struct Running {
    process: Doomed,
    socket: Socket,
    next_request: u64,
    changes: HashMap<u64, oneshot::Sender<()>>,
    inspections: HashMap<u64, oneshot::Sender<Report>>,
}

impl Running {
    async fn start(spawner: &Spawner, shared: &Shared) -> Result<Self, Error> {
        let (socket, theirs) = control::pair().map_err(Error::Start)?;
        let process = Doomed::new(spawner.spawn_net(theirs).await.map_err(Error::Start)?);
        let running =
            Self { process, socket, next_request: 0, changes: HashMap::new(), inspections: HashMap::new() };
        match timeout(START_TIMEOUT, running.begin(shared)).await {
            Ok(Ok(())) => Ok(running),
            Ok(Err(error)) => Err(Error::Ended(format!("failed ({error})"))),
            Err(_) => Err(Error::Ended("said nothing in time".to_owned())),
        }
    }

    async fn begin(&self, shared: &Shared) -> Result<(), control::Error> {
        self.socket.send(&ToNet::Start(shared.settings.clone()), &[]).await?;
        match self.socket.receive::<FromNet>().await? {
            Some((FromNet::Started, _)) => Ok(()),
            _ => Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()),
        }
    }

    /// Starts it and tells it of all links there are.
    async fn restart(spawner: &Spawner, shared: &Shared) -> Result<Self, Error> {
        let running = Self::start(spawner, shared).await?;
        let links: Vec<u64> = shared.links().keys().copied().collect();
        for link in links {
            let told = async {
                running.attach(shared, link).await?;
                running.bind(shared, link).await
            };
            told.await.map_err(|error: control::Error| Error::Ended(format!("failed ({error})")))?;
        }
        Ok(running)
    }

    /// Until the daemon ends (`None`) or the process does.
    async fn serve(
        &mut self,
        shared: &Shared,
        orders: &mut mpsc::UnboundedReceiver<Order>,
    ) -> Option<String> {
        loop {
            let failed = tokio::select! {
                order = orders.recv() => self.carry_out(shared, order?).await.err(),
                answer = self.socket.receive::<FromNet>() => match answer {
                    Ok(Some((answer, _))) => {
                        self.hear(answer);
                        None
                    }
                    Ok(None) => Some(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()),
                    Err(error) => Some(error),
                },
            };
            if let Some(error) = failed {
                let exit = timeout(RESTART_PAUSE, self.process.wait()).await;
                return Some(match exit {
                    Ok(Ok(exit)) => exit.to_string(),
                    _ => error.to_string(),
                });
            }
        }
    }

    async fn carry_out(&mut self, shared: &Shared, order: Order) -> Result<(), control::Error> {
        let message = match order {
            Order::Attach(link) => return self.attach(shared, link).await,
            Order::Bind(link) => return self.bind(shared, link).await,
            Order::Detach(link) => ToNet::Detach { link },
            Order::Reset { link, done } => {
                let request = self.request();
                self.changes.insert(request, done);
                ToNet::Reset { request, link }
            }
            Order::SetPolicy { link, policy, done } => {
                let request = self.request();
                self.changes.insert(request, done);
                ToNet::SetPolicy { request, link, policy }
            }
            Order::Inspect { link, denials_from, report } => {
                let request = self.request();
                self.inspections.insert(request, report);
                ToNet::Inspect { request, link, denials_from }
            }
        };
        self.socket.send(&message, &[]).await
    }

    fn request(&mut self) -> u64 {
        self.next_request += 1;
        self.next_request
    }

    /// A link that is gone meanwhile needs no telling.
    async fn attach(&self, shared: &Shared, link: u64) -> Result<(), control::Error> {
        let frames = shared.links().get(&link).map(|known| known.frames.clone());
        let Some(frames) = frames else { return Ok(()) };
        self.socket.send(&ToNet::Attach { link }, &[frames.as_fd()]).await
    }

    async fn bind(&self, shared: &Shared, link: u64) -> Result<(), control::Error> {
        let bound = shared.links().get(&link).and_then(|known| known.bound.clone());
        let Some(Bound { guest, policy, limits }) = bound else { return Ok(()) };
        self.socket.send(&ToNet::Bind { link, guest, policy, limits }, &[]).await
    }

    fn hear(&mut self, answer: FromNet) {
        match answer {
            FromNet::Started => {}
            FromNet::Done { request } => {
                self.changes.remove(&request).map(|done| done.send(()));
            }
            FromNet::Report { request, report } => {
                self.inspections.remove(&request).map(|answer| answer.send(*report));
            }
            // Who asked finds the sender gone.
            FromNet::NoLink { request } => {
                self.changes.remove(&request);
                self.inspections.remove(&request);
            }
        }
    }
}
