//! The network of forks, as the daemon holds it: who has which address, what each may reach, and the process that
//! carries it out.
//!
//! The net process is started with the first template that has a NIC. If it dies it is started anew and told of all
//! links again: connections are reset, forks live on.

use std::{
    collections::HashMap,
    io,
    net::Ipv4Addr,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use forkling_net::control::{Guest, Limits, Policy, Report, Settings};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair, sockopt};
use serde::{Deserialize, Serialize};
use tokio::sync::{OnceCell, mpsc, oneshot};
use utoipa::ToSchema;

use crate::process::Spawner;

pub use addresses::{Address, Addresses, Error as AddressError};
pub use tap::{NamesUnsupported, TapSettings};

mod addresses;
mod process;
pub mod rules;
mod tap;

/// Bytes of frames that may wait in a frame socket, each way: several of the longest.
const FRAME_BUFFER: usize = 1 << 20;

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused.
    #[error("cannot start the net process")]
    Start(#[source] io::Error),
    /// It did not serve.
    #[error("the net process {0} before it served")]
    Ended(String),
    /// It cannot be reached.
    #[error("the net process is being restarted; try again")]
    Gone,
    /// A socket could not be had.
    #[error("cannot make a frame socket; raise the limit of open files")]
    Socket(#[source] io::Error),
    /// An address cannot be had.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// Taps cannot do it.
    #[error(transparent)]
    Tap(#[from] tap::Error),
}

impl Error {
    /// The address that is the reason, if one is.
    pub fn address(&self) -> Option<&AddressError> {
        match self {
            Self::Address(error) | Self::Tap(tap::Error::Address(error)) => Some(error),
            _ => None,
        }
    }

    /// Whether there may be another NIC when one of those there are has gone.
    pub fn is_exhausted(&self) -> bool {
        matches!(self, Self::Tap(tap::Error::Exhausted(_)))
    }
}

/// The network of a daemon.
#[derive(Debug)]
pub struct Network {
    addresses: Arc<Addresses>,
    shared: Arc<Shared>,
    orders: OnceCell<mpsc::UnboundedSender<Order>>,
    /// Carries the forks, if they do not use the net process. Templates that are built always do.
    taps: Option<tap::Taps>,
}

/// What the daemon keeps for a net process that has to be started anew.
#[derive(Debug)]
struct Shared {
    settings: Settings,
    links: Mutex<HashMap<u64, Known>>,
    next_link: AtomicU64,
}

/// A link, as it was last told to the net process.
#[derive(Debug)]
struct Known {
    frames: Arc<OwnedFd>,
    bound: Option<Bound>,
}

/// What carries the frames of forks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// The net process: no privilege, domain names, denials one by one.
    #[default]
    User,
    /// TAP devices, routed and filtered by the kernel: throughput.
    Tap,
}

/// Who is on a link, and what it may do.
#[derive(Clone, Debug)]
pub struct Bound {
    /// Who.
    pub guest: Guest,
    /// What it may reach.
    pub policy: Policy,
    /// How much.
    pub limits: Limits,
}

/// For the task that talks to the net process.
#[derive(Debug)]
enum Order {
    Attach(u64),
    Bind(u64),
    Detach(u64),
    Reset { link: u64, done: oneshot::Sender<()> },
    SetPolicy { link: u64, policy: Policy, done: oneshot::Sender<()> },
    Inspect { link: u64, denials_from: u64, report: oneshot::Sender<Report> },
}

/// A NIC's wire, the net process's end of it. Dropped, it is cut.
#[derive(Debug)]
pub struct Link {
    number: u64,
    shared: Arc<Shared>,
    orders: mpsc::UnboundedSender<Order>,
}

/// A fork's NIC, the daemon's side of it.
#[derive(Debug)]
pub enum Nic {
    /// Served by the net process.
    User(Link),
    /// Served by the kernel.
    Tap(tap::TapLink),
}

/// A NIC for a new fork.
#[derive(Debug)]
pub struct NewNic {
    /// The daemon's side.
    pub nic: Nic,
    /// The fork's.
    pub frames: OwnedFd,
    /// The address that it has already, or that was asked for.
    pub address: Option<Address>,
}

impl Nic {
    /// The name of what carries its frames.
    pub fn backend(&self) -> Backend {
        match self {
            Self::User(_) => Backend::User,
            Self::Tap(_) => Backend::Tap,
        }
    }

    /// Prepares what its guest may do. To be awaited before the guest runs with its identity; nothing is sent for a guest
    /// for which the same was prepared before.
    pub async fn admit(&self, bound: impl FnOnce() -> Bound) -> Result<(), Error> {
        match self {
            // It holds frames back until it is bound.
            Self::User(_) => Ok(()),
            Self::Tap(tap) => Ok(tap.admit(bound()).await?),
        }
    }

    /// Says who is on it, once its guest has acknowledged.
    pub fn bind(&self, bound: impl FnOnce() -> Bound) {
        if let Self::User(link) = self {
            link.bind(bound());
        }
    }

    /// Ends its guest's connections, because the guest knows of none any more.
    pub async fn reset(&self) -> Result<(), Error> {
        match self {
            Self::User(link) => link.reset().await,
            Self::Tap(tap) => tap.reset().await?,
        }
        Ok(())
    }

    /// Changes what its guest may reach; connections that are not allowed any more are ended.
    pub async fn set_policy(&self, policy: Policy) -> Result<(), Error> {
        match self {
            Self::User(link) => link.set_policy(policy).await,
            Self::Tap(tap) => Ok(tap.set_policy(policy).await?),
        }
    }

    /// What it carried and was denied, from denial number `denials_from` on.
    pub async fn inspect(&self, denials_from: u64) -> Result<Report, Error> {
        match self {
            Self::User(link) => link.inspect(denials_from).await,
            Self::Tap(tap) => Ok(tap.inspect().await?),
        }
    }
}

impl Network {
    /// A network whose net process is not started yet. With `taps`, forks use those.
    ///
    /// # Errors
    /// There can be no taps.
    pub fn new(settings: Settings, taps: Option<TapSettings>) -> Result<Self, Error> {
        let addresses = Addresses::new(settings.guests);
        let taps = taps.map(|taps| tap::Taps::start(&settings, taps, addresses.clone())).transpose()?;
        Ok(Self {
            addresses,
            shared: Arc::new(Shared { settings, links: Mutex::default(), next_link: AtomicU64::new(1) }),
            orders: OnceCell::new(),
            taps,
        })
    }

    /// Whether forks may have such a policy.
    pub fn supports(&self, policy: &Policy) -> Result<(), NamesUnsupported> {
        if self.taps.is_some() { tap::supports(policy) } else { Ok(()) }
    }

    /// A NIC for a new fork, with a certain address if `chosen`. The network was started.
    pub async fn nic(&self, chosen: Option<Ipv4Addr>) -> Result<NewNic, Error> {
        let address = chosen.map(|chosen| self.addresses.claim(chosen)).transpose()?;
        match &self.taps {
            None => {
                let (link, frames) = self.link()?;
                Ok(NewNic { nic: Nic::User(link), frames, address })
            }
            Some(taps) => {
                let (link, frames, address) = taps.take(address).await?;
                Ok(NewNic { nic: Nic::Tap(link), frames, address: Some(address) })
            }
        }
    }

    /// Removes what the host would keep. The forks are gone.
    pub fn end(&self) {
        self.taps.iter().for_each(tap::Taps::end);
    }

    /// Addresses of guests.
    pub fn addresses(&self) -> &Arc<Addresses> {
        &self.addresses
    }

    /// Starts what forks need, unless it runs.
    pub async fn start_for_forks(&self, spawner: &Spawner) -> Result<(), Error> {
        // Taps are there from the beginning.
        if self.taps.is_some() { Ok(()) } else { self.start(spawner).await }
    }

    /// Starts the net process unless it runs. With taps, only templates that are built need it.
    pub async fn start(&self, spawner: &Spawner) -> Result<(), Error> {
        let start = || process::start(spawner.clone(), self.shared.clone());
        self.orders.get_or_try_init(start).await.map(|_| ())
    }

    /// A new link and the guest's end of it, non-blocking. The network was started.
    pub fn link(&self) -> Result<(Link, OwnedFd), Error> {
        let orders = self.orders.get().ok_or(Error::Gone)?.clone();
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let (ours, theirs) = pair.map_err(|errno| Error::Socket(errno.into()))?;
        for end in [&ours, &theirs] {
            // Beyond the host's limit only for the privileged; with less, frames wait in the guest sooner.
            let _ = sockopt::set_socket_send_buffer_size_force(end, FRAME_BUFFER)
                .or_else(|_| sockopt::set_socket_send_buffer_size(end, FRAME_BUFFER));
        }
        let number = self.shared.next_link.fetch_add(1, Ordering::Relaxed);
        self.shared.links().insert(number, Known { frames: Arc::new(ours), bound: None });
        let link = Link { number, shared: self.shared.clone(), orders };
        link.order(Order::Attach(number));
        Ok((link, theirs))
    }
}

impl Shared {
    fn links(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Known>> {
        self.links.lock().expect("no panic under this lock")
    }
}

impl Link {
    /// Says who is on the link: frames pass from now on.
    pub fn bind(&self, bound: Bound) {
        if let Some(known) = self.shared.links().get_mut(&self.number) {
            known.bound = Some(bound);
        }
        self.order(Order::Bind(self.number));
    }

    /// Ends its guest's connections, because the guest knows of none any more. The guest is unplugged. Returns when
    /// nothing of them is left, so that nothing of what the guest does next is taken for them.
    pub async fn reset(&self) {
        let (done, answer) = oneshot::channel();
        self.order(Order::Reset { link: self.number, done });
        // A net process that is gone took the connections with it.
        let _ = answer.await;
    }

    /// Changes what its guest may reach; connections that are not allowed any more are reset.
    pub async fn set_policy(&self, policy: Policy) -> Result<(), Error> {
        if let Some(bound) = self.shared.links().get_mut(&self.number).and_then(|known| known.bound.as_mut())
        {
            bound.policy = policy.clone();
        }
        let (done, answer) = oneshot::channel();
        self.order(Order::SetPolicy { link: self.number, policy, done });
        answer.await.map_err(|_| Error::Gone)
    }

    /// What it carried and was denied, from denial number `denials_from` on.
    pub async fn inspect(&self, denials_from: u64) -> Result<Report, Error> {
        let (report, answer) = oneshot::channel();
        self.order(Order::Inspect { link: self.number, denials_from, report });
        answer.await.map_err(|_| Error::Gone)
    }

    /// Off the caller's way: a task sends it.
    fn order(&self, order: Order) {
        // The task lives as long as the daemon.
        let _ = self.orders.send(order);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.links().remove(&self.number);
        self.order(Order::Detach(self.number));
    }
}

/// Addresses of guests, if nothing else is said: the range that carriers use between themselves and their customers
/// (RFC 6598), so that it is neither public nor anybody's private network.
pub const DEFAULT_RANGE: (Ipv4Addr, u8) = (Ipv4Addr::new(100, 64, 0, 0), 10);
