//! The TAP backend: a fork's NIC is a TAP device of the kernel's, for hosts where the daemon has the privilege.
//!
//! All taps lie in a network namespace of the daemon's own, which one thread ([`worker`]) makes, enters and never leaves. A
//! veth pair leads out of it into the host's. Namespace, taps, veth and rules go with the thread and the forks' descriptors,
//! so a daemon that is killed leaves one nftables table on the host, which the next one removes ([`host`]).
//!
//! Taps are made ahead of their forks, each with an address, the route to it, and rules that let nothing pass.

use std::{
    io,
    net::Ipv4Addr,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, mpsc},
    thread::JoinHandle,
};

use crossbeam::channel::{Receiver, Sender, unbounded};
use forkling_net::control::{Counters, Destination, Limits, Membership, Policy, Report, Settings};
use tokio::sync::oneshot;

use super::{Address, AddressError, Addresses, Bound};
use host::{Ends, HostSide};
use worker::Worker;

mod conntrack;
mod counters;
mod host;
mod rules;
mod tools;
mod worker;

/// Why there is no TAP network, or not what was asked of it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The daemon is not privileged.
    #[error("the daemon has no CAP_SYS_ADMIN and CAP_NET_ADMIN; run it as root, or use --network user")]
    Privilege,
    /// A program is not installed.
    #[error(
        "{0} is not installed; install it (Debian: apt install nftables iproute2), or use --network user"
    )]
    NoTool(&'static str),
    /// No namespace.
    #[error("cannot make a network namespace: {0}; --network tap needs CAP_SYS_ADMIN and CAP_NET_ADMIN")]
    Namespace(io::Error),
    /// No TAP device.
    #[error(
        "cannot make a TAP device: {0}; --network tap needs /dev/net/tun (modprobe tun) and CAP_NET_ADMIN"
    )]
    Tap(io::Error),
    /// A setting of the kernel cannot be changed.
    #[error("cannot write {path}: {source}; --network tap needs /proc/sys to be writable")]
    Sysctl {
        /// Of what.
        path: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The host does not forward packets.
    #[error(
        "this host does not forward IPv4 packets; run 'sysctl -w net.ipv4.ip_forward=1', or use --network user"
    )]
    NotForwarding,
    /// A program failed.
    #[error("{program} failed: {said}")]
    Tool {
        /// Which.
        program: &'static str,
        /// Its words.
        said: String,
    },
    /// Every name of the pair of interfaces that lead out is taken.
    #[error("there are {0} daemons with --network tap on this host already")]
    TooMany(u32),
    /// The host's addresses cannot be read, so policies could not be kept.
    #[error("cannot read the addresses of this host")]
    Addresses(#[source] io::Error),
    /// Connections in the kernel's tables cannot be listed or cut.
    #[error("cannot use the kernel's table of connections; is the module nf_conntrack_netlink there?")]
    Connections(#[source] io::Error),
    /// All taps are taken.
    #[error("all {0} taps are taken")]
    Exhausted(u32),
    /// The fork's address cannot be had.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// What nftables counted cannot be understood.
    #[error("nft gave counters that cannot be understood")]
    Counters(#[from] serde_json::Error),
    /// No thread.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// The thread is gone.
    #[error("the TAP network has ended")]
    Gone,
}

/// Domain names in a policy, which only the user network resolves.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is a domain name")]
pub struct NamesUnsupported(pub String);

/// How many taps there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TapSettings {
    /// Most, taken and ready ones together.
    pub taps: u32,
}

/// The taps of a daemon.
#[derive(Debug)]
pub struct Taps {
    jobs: Sender<Job>,
    thread: Mutex<Option<JoinHandle<()>>>,
    host: Mutex<Option<HostSide>>,
}

/// For the thread in the namespace.
enum Job {
    Take { address: Option<Address>, answer: oneshot::Sender<Result<Tap, Error>> },
    Admit { admission: Box<Admission>, answer: oneshot::Sender<Result<(), Error>> },
    Policy { number: u32, policy: Policy, answer: oneshot::Sender<Result<(), Error>> },
    Cut { number: u32, answer: oneshot::Sender<Result<(), Error>> },
    Inspect { number: u32, answer: oneshot::Sender<Result<Counters, Error>> },
    Release { number: u32 },
    End,
}

/// Who is to use a tap, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Admission {
    number: u32,
    policy: Policy,
    limits: Limits,
    group: Option<Membership>,
}

/// A TAP with its address, on its way to a fork.
#[derive(Debug)]
struct Tap {
    number: u32,
    device: OwnedFd,
    address: Address,
}

/// A fork's tap, the daemon's side of it. Dropped, its rules are removed; the device goes with its descriptors.
#[derive(Debug)]
pub struct TapLink {
    number: u32,
    jobs: Sender<Job>,
    /// What it was let do, not to say it twice.
    admitted: Mutex<Option<Admission>>,
}

impl Taps {
    /// Makes the namespace and what leads out of it, and begins to make taps.
    ///
    /// # Errors
    /// See [`Error`]: privilege, programs or modules that are not there. Nothing is left behind.
    pub fn start(settings: &Settings, taps: TapSettings, addresses: Arc<Addresses>) -> Result<Self, Error> {
        host::check()?;
        let tools = tools::Tools::find()?;
        host::sweep(&tools)?;
        let (jobs, orders) = unbounded();
        let (ready, told) = mpsc::channel();
        let (go, gone) = mpsc::channel();
        let (begun, resolvers) = (tools.clone(), settings.resolvers.clone());
        let settings = settings.clone();
        let thread = std::thread::Builder::new().name("taps".to_owned()).spawn(move || {
            let entered = Worker::enter(begun, &settings, taps, addresses);
            serve(entered, &orders, &ready, &gone);
        });
        let thread = thread.map_err(Error::Thread)?;
        // This thread is in the host's namespace, that one is not.
        let ends = told.recv().map_err(|_| Error::Gone)??;
        let host = HostSide::new(&tools, ends, &resolvers)?;
        let _ = go.send(());
        told.recv().map_err(|_| Error::Gone)??;
        Ok(Self { jobs, thread: Mutex::new(Some(thread)), host: Mutex::new(Some(host)) })
    }

    /// A tap for a new fork, with `address` or any: the daemon's side, the fork's, and the address.
    pub async fn take(&self, address: Option<Address>) -> Result<(TapLink, OwnedFd, Address), Error> {
        let tap = ask(&self.jobs, |answer| Job::Take { address, answer }).await?;
        let Tap { number, device, address } = tap;
        let link = TapLink { number, jobs: self.jobs.clone(), admitted: Mutex::default() };
        Ok((link, device, address))
    }

    /// Removes everything. The forks are gone.
    pub fn end(&self) {
        let _ = self.jobs.send(Job::End);
        let thread = self.thread.lock().expect("no panic under this lock").take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread of the TAP network panicked");
        }
        drop(self.host.lock().expect("no panic under this lock").take());
    }
}

/// The thread: in the namespace, until the end.
fn serve(
    entered: Result<Worker, Error>,
    orders: &Receiver<Job>,
    ready: &mpsc::Sender<Result<Ends, Error>>,
    go: &mpsc::Receiver<()>,
) {
    let mut worker = match entered {
        Ok(worker) => worker,
        Err(error) => return drop(ready.send(Err(error))),
    };
    let _ = ready.send(Ok(worker.ends()));
    // Whoever waits gives up if the host's end cannot be made.
    if go.recv().is_err() {
        return;
    }
    let opened = worker.open();
    let failed = opened.is_err();
    let _ = ready.send(opened.map(|()| worker.ends()));
    if !failed {
        worker.run(orders);
    }
}

async fn ask<T>(
    jobs: &Sender<Job>,
    job: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Job,
) -> Result<T, Error> {
    let (answer, answered) = oneshot::channel();
    jobs.send(job(answer)).map_err(|_| Error::Gone)?;
    answered.await.map_err(|_| Error::Gone)?
}

impl TapLink {
    /// Lets the fork do what `bound` says, unless that was said before. To be awaited before its guest runs.
    pub async fn admit(&self, bound: Bound) -> Result<(), Error> {
        let Bound { guest, policy, limits } = bound;
        let admission = Admission { number: self.number, policy, limits, group: guest.group };
        let known = self.admitted.lock().expect("no panic under this lock").as_ref() == Some(&admission);
        if known {
            return Ok(());
        }
        let order = Box::new(admission.clone());
        ask(&self.jobs, |answer| Job::Admit { admission: order, answer }).await?;
        *self.admitted.lock().expect("no panic under this lock") = Some(admission);
        Ok(())
    }

    /// Forgets the guest's connections.
    pub async fn reset(&self) -> Result<(), Error> {
        ask(&self.jobs, |answer| Job::Cut { number: self.number, answer }).await
    }

    /// Changes what the guest may reach; connections that are not allowed any more are cut.
    pub async fn set_policy(&self, policy: Policy) -> Result<(), Error> {
        let wanted = policy.clone();
        ask(&self.jobs, |answer| Job::Policy { number: self.number, policy, answer }).await?;
        if let Some(admitted) = self.admitted.lock().expect("no panic under this lock").as_mut() {
            admitted.policy = wanted;
        }
        Ok(())
    }

    /// What it carried. The kernel keeps no list of what was denied, only their number.
    pub async fn inspect(&self) -> Result<Report, Error> {
        let counters = ask(&self.jobs, |answer| Job::Inspect { number: self.number, answer }).await?;
        Ok(Report { counters, ..Report::default() })
    }
}

impl Drop for TapLink {
    fn drop(&mut self) {
        let _ = self.jobs.send(Job::Release { number: self.number });
    }
}

/// Whether taps can carry out `policy`.
pub fn supports(policy: &Policy) -> Result<(), NamesUnsupported> {
    let named = policy.rules.iter().find_map(|rule| match &rule.to {
        // Every name, with `internet`: then the resolver is just another server.
        Destination::Name(name) if name != "*" => Some(name.clone()),
        _ => None,
    });
    named.map_or(Ok(()), |name| Err(NamesUnsupported(name)))
}

/// Name of a tap in the namespace.
fn name_of(number: u32) -> String {
    format!("t{number}")
}

/// A guest's address, as rules and routes need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    number: u32,
    ipv4: Ipv4Addr,
}
