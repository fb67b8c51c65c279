//! The thread in the namespace: makes taps ahead, and tells the kernel's tables what the daemon decides.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fmt::Write as _,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use crossbeam::channel::{Receiver, RecvTimeoutError, TryRecvError};
use forkling_net::{
    control::{Policy, Protocol, Settings},
    host::HostAddresses,
    policy::{Target, Verdict, World, decide},
};
use forkling_proto::network::{GATEWAY, MTU, ipv6_of, mac_of};
use forkling_vmm::sys::tap;
use ipnet::Ipv4Net;
use tokio::sync::oneshot;

use super::{
    Address, Addresses, Admission, Error, Job, Place, Tap, TapSettings,
    conntrack::{Connection, Connections},
    counters,
    host::{Ends, MAX_DAEMONS, has_ipv6, write_setting},
    name_of,
    rules::{self, UPLINK},
    tools::Tools,
};

/// Taps that are kept ready.
const READY: usize = 16;

/// Taps made in one go, when nothing else is to be done.
const MADE_TOGETHER: usize = 4;

/// How often the host's addresses are looked at, and what could not be made is tried again.
const TICK: Duration = Duration::from_secs(1);

/// Packets that may wait for a guest. Each has at most 64 KiB.
const QUEUE: u32 = 256;

/// Settings of the namespace; those for IPv6 only where there is IPv6.
const SETTINGS: [(&str, &str); 6] = [
    ("ipv4/ip_forward", "1"),
    ("ipv6/conf/all/forwarding", "1"),
    // Taps have no address of their own, and nothing to announce to a guest.
    ("ipv6/conf/default/addr_gen_mode", "1"),
    ("ipv6/conf/default/accept_ra", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/default/router_solicitations", "0"),
];

/// The thread's state.
pub struct Worker {
    tools: Tools,
    ends: Ends,
    guests: Ipv4Net,
    most: u32,
    addresses: Arc<Addresses>,
    connections: Connections,
    own: HostAddresses,
    known_own: HashSet<IpAddr>,
    next: u32,
    ready: VecDeque<Tap>,
    taken: HashMap<u32, Taken>,
    groups: HashMap<String, Group>,
    next_group: u32,
}

/// A tap that a fork has.
struct Taken {
    place: Place,
    admission: Option<Admission>,
}

struct Group {
    number: u32,
    members: HashSet<u32>,
}

/// Commands for nft, and who waits for them.
type Batch = Vec<(String, Option<oneshot::Sender<Result<(), Error>>>)>;

impl Worker {
    /// Gives the thread its namespace, and that a link to the host's.
    pub fn enter(
        tools: Tools,
        settings: &Settings,
        taps: TapSettings,
        addresses: Arc<Addresses>,
    ) -> Result<Self, Error> {
        let own = HostAddresses::read(Instant::now()).map_err(Error::Addresses)?;
        tap::leave_network().map_err(Error::Namespace)?;
        for (name, value) in SETTINGS.iter().filter(|(name, _)| has_ipv6() || name.starts_with("ipv4")) {
            write_setting(&format!("/proc/sys/net/{name}"), value)?;
        }
        let ends = link(&tools)?;
        Ok(Self {
            tools,
            ends,
            guests: settings.guests,
            most: taps.taps,
            addresses,
            connections: Connections::open().map_err(Error::Connections)?,
            own,
            known_own: HashSet::new(),
            next: 1,
            ready: VecDeque::new(),
            taken: HashMap::new(),
            groups: HashMap::new(),
            next_group: 1,
        })
    }

    /// What leads out.
    pub fn ends(&self) -> Ends {
        self.ends
    }

    /// Sets up the namespace's end, when the host's is there, and the rules; makes a first tap, to know that it can.
    pub fn open(&mut self) -> Result<(), Error> {
        let ends = self.ends;
        let mut commands = format!(
            "link set lo up
link set {UPLINK} up
address add {}/31 dev {UPLINK}
route add default via {}
",
            ends.inner(),
            ends.host()
        );
        if has_ipv6() {
            let (inner, host) = (ends.inner_v6(), ends.host_v6());
            let _ = write!(
                commands,
                "address add {inner}/127 dev {UPLINK} nodad\nroute add default via {host} dev {UPLINK}\n"
            );
        }
        // The gateway is a name for the resolver: the host knows where that is.
        let _ = writeln!(commands, "route add {GATEWAY}/32 via {}", ends.host());
        self.tools.ip(&commands)?;
        self.tools.nft(&rules::base(self.guests))?;
        self.look_at_host()?;
        // An empty list is an answer; a kernel without the module gives none.
        self.connections.list(1).map_err(Error::Connections)?;
        self.make(1)
    }

    /// Serves until the end.
    pub fn run(mut self, jobs: &Receiver<Job>) {
        let mut looked = Instant::now();
        let mut pause = false;
        loop {
            let job = match jobs.try_recv() {
                Ok(job) => Some(job),
                Err(TryRecvError::Disconnected) => return,
                Err(TryRecvError::Empty) if self.wants() > 0 && !pause => {
                    pause = self.refill();
                    None
                }
                Err(TryRecvError::Empty) => match jobs.recv_timeout(TICK) {
                    Ok(job) => Some(job),
                    Err(RecvTimeoutError::Timeout) => None,
                    Err(RecvTimeoutError::Disconnected) => return,
                },
            };
            if job.is_some_and(|job| !self.serve(job, jobs)) {
                return;
            }
            if looked.elapsed() >= TICK {
                (looked, pause) = (Instant::now(), false);
                if let Err(error) = self.look_at_host() {
                    tracing::error!(%error, "policies know an old list of this host's addresses");
                }
            }
        }
    }

    /// One job, and with it all that can be told nft in the same breath. False: it is the end.
    fn serve(&mut self, job: Job, jobs: &Receiver<Job>) -> bool {
        let mut batch = Batch::new();
        let mut next = Some(job);
        while let Some(job) = next.take() {
            match job {
                Job::Admit { admission, answer } => {
                    let text = self.admit(*admission);
                    batch.push((text, Some(answer)));
                }
                Job::Release { number } => batch.extend(self.release(number).map(|text| (text, None))),
                other => {
                    self.commit(std::mem::take(&mut batch));
                    if matches!(other, Job::End) {
                        return false;
                    }
                    self.answer(other);
                }
            }
            next = jobs.try_recv().ok();
        }
        self.commit(batch);
        true
    }

    fn answer(&mut self, job: Job) {
        // Whoever asked may have gone away; a tap that nobody takes is released by its fall.
        match job {
            Job::Take { address, answer } => {
                let taken = self.take(address);
                if let Err(Ok(tap)) = answer.send(taken) {
                    let text = self.release(tap.number);
                    self.commit(text.map(|text| (text, None)).into_iter().collect());
                }
            }
            Job::Policy { number, policy, answer } => drop(answer.send(self.set_policy(number, policy))),
            Job::Cut { number, answer } => {
                drop(answer.send(self.connections.cut_all(number).map_err(Error::Connections)));
            }
            Job::Inspect { number, answer } => drop(answer.send(self.inspect(number))),
            Job::Admit { .. } | Job::Release { .. } | Job::End => {}
        }
    }

    /// All at once; if that fails, one after the other, so that each gets its own answer.
    fn commit(&self, batch: Batch) {
        if batch.is_empty() {
            return;
        }
        let all: String = batch.iter().map(|(text, _)| text.as_str()).collect();
        let mut outcome = self.tools.nft(&all);
        let single = batch.len() == 1;
        for (text, answer) in batch {
            if outcome.is_err() && !single {
                outcome = self.tools.nft(&text);
            }
            match (answer, std::mem::replace(&mut outcome, Ok(()))) {
                (Some(answer), told) => drop(answer.send(told)),
                (None, Err(error)) => tracing::warn!(%error, "rules of a tap that is gone are left over"),
                (None, Ok(())) => {}
            }
        }
    }

    fn admit(&mut self, admission: Admission) -> String {
        let number = admission.number;
        let Some(place) = self.taken.get(&number).map(|taken| taken.place) else { return String::new() };
        let name = |admission: &Admission| admission.group.as_ref().map(|of| of.group.clone());
        let before = self.taken.get(&number).and_then(|taken| taken.admission.as_ref()).and_then(name);
        let (mut text, group) = match name(&admission) {
            Some(group) => {
                let (text, group) = self.join(&group, place);
                (text, Some(group))
            }
            None => (String::new(), None),
        };
        text += &rules::limits(number, admission.limits);
        text += &rules::policy(number, &admission.policy, admission.limits, group);
        if before != name(&admission) {
            text += &self.leave(number);
        }
        if let Some(taken) = self.taken.get_mut(&number) {
            taken.admission = Some(admission);
        }
        text
    }

    fn join(&mut self, name: &str, place: Place) -> (String, u32) {
        let mut text = String::new();
        let group = self.groups.entry(name.to_owned()).or_insert_with(|| {
            let number = self.next_group;
            self.next_group += 1;
            text += &rules::add_group(number);
            Group { number, members: HashSet::new() }
        });
        group.members.insert(place.number);
        text += &rules::member("add", group.number, place.ipv4);
        (text, group.number)
    }

    /// Takes a tap out of its group; chains that name the group are to be emptied before.
    fn leave(&mut self, number: u32) -> String {
        let Some(taken) = self.taken.get(&number) else { return String::new() };
        let membership = taken.admission.as_ref().and_then(|admission| admission.group.as_ref());
        let Some(name) = membership.map(|membership| membership.group.clone()) else { return String::new() };
        let Some(group) = self.groups.get_mut(&name) else { return String::new() };
        group.members.remove(&number);
        let mut text = rules::member("delete", group.number, taken.place.ipv4);
        if group.members.is_empty() {
            text += &rules::remove_group(group.number);
            self.groups.remove(&name);
        }
        text
    }

    fn release(&mut self, number: u32) -> Option<String> {
        let left = self.leave(number);
        self.taken.remove(&number)?;
        if let Err(error) = self.connections.cut_all(number) {
            tracing::warn!(%error, "connections of a fork that is gone are left to time out");
        }
        Some(format!("{}{left}", rules::detach(number)))
    }

    fn set_policy(&mut self, number: u32, policy: Policy) -> Result<(), Error> {
        let Some(taken) = self.taken.get_mut(&number) else { return Err(Error::Gone) };
        let Some(admission) = taken.admission.as_mut() else { return Err(Error::Gone) };
        let group = admission.group.as_ref().and_then(|of| self.groups.get(&of.group));
        self.tools.nft(&rules::policy(number, &policy, admission.limits, group.map(|group| group.number)))?;
        admission.policy = policy;
        let admission = admission.clone();
        for connection in self.connections.list(number).map_err(Error::Connections)? {
            if !self.allows(&admission.policy, &connection) {
                self.connections.cut(&connection).map_err(Error::Connections)?;
            }
        }
        Ok(())
    }

    /// Whether a connection may live on under another policy. Those within a group always do.
    fn allows(&self, policy: &Policy, connection: &Connection) -> bool {
        let Connection { to, protocol, port, .. } = connection;
        let in_group = match to {
            IpAddr::V4(v4) => self.guests.contains(v4),
            IpAddr::V6(v6) => v6.segments()[..6] == ipv6_of(GATEWAY).segments()[..6],
        };
        if in_group || *to == GATEWAY {
            return in_group
                || policy
                    .rules
                    .iter()
                    .any(|rule| matches!(rule.to, forkling_net::control::Destination::Name(_)));
        }
        let protocol = match protocol {
            6 => Protocol::Tcp,
            17 => Protocol::Udp,
            _ => Protocol::Icmp,
        };
        let target = Target { protocol, address: *to, port: *port };
        let world = World { guests: self.guests, own: &self.known_own };
        decide(policy, world, target, std::iter::empty()) != Verdict::Denied
    }

    fn inspect(&self, number: u32) -> Result<forkling_net::control::Counters, Error> {
        let mut listed = String::new();
        for chain in rules::counters(number) {
            listed += &self.tools.nft_json(&chain)?;
        }
        let flows = self.connections.list(number).map_err(Error::Connections)?.len();
        Ok(counters::parse(&listed, flows)?)
    }

    fn take(&mut self, address: Option<Address>) -> Result<Tap, Error> {
        let tap = match address {
            Some(address) => {
                // One with another address has to give way.
                if self.room() == 0
                    && let Some(surplus) = self.ready.pop_front()
                {
                    self.discard(surplus);
                }
                self.make_with(vec![address])?;
                self.ready.pop_back()
            }
            None => {
                if self.ready.is_empty() {
                    self.make(1)?;
                }
                self.ready.pop_front()
            }
        };
        let tap = tap.ok_or(Error::Exhausted(self.most))?;
        let place = Place { number: tap.number, ipv4: tap.address.network().ipv4 };
        self.taken.insert(tap.number, Taken { place, admission: None });
        Ok(tap)
    }

    fn discard(&mut self, tap: Tap) {
        self.commit(vec![(rules::detach(tap.number), None)]);
    }

    /// How many more taps there may be.
    fn room(&self) -> usize {
        (self.most as usize).saturating_sub(self.ready.len() + self.taken.len())
    }

    fn wants(&self) -> usize {
        READY.saturating_sub(self.ready.len()).min(self.room())
    }

    /// Makes some. True: it failed, and is to be tried again later.
    fn refill(&mut self) -> bool {
        let made = self.make(self.wants().min(MADE_TOGETHER));
        if let Err(error) = &made {
            tracing::warn!(%error, "no tap could be made ahead");
        }
        made.is_err()
    }

    fn make(&mut self, count: usize) -> Result<(), Error> {
        let addresses: Result<Vec<_>, _> = (0..count).map(|_| self.addresses.any()).collect();
        self.make_with(addresses?)
    }

    /// Makes taps with these addresses, and routes and rules for them, and puts them last.
    fn make_with(&mut self, addresses: Vec<Address>) -> Result<(), Error> {
        if self.room() < addresses.len() {
            return Err(Error::Exhausted(self.most));
        }
        let (mut commands, mut text, mut made) = (String::new(), String::new(), Vec::new());
        for address in addresses {
            let place = Place { number: self.next, ipv4: address.network().ipv4 };
            self.next += 1;
            let device = tap::open(&name_of(place.number)).map_err(Error::Tap)?;
            commands += &interface(place);
            text += &rules::attach(place);
            made.push(Tap { number: place.number, device, address });
        }
        self.tools.ip(&commands)?;
        self.tools.nft(&text)?;
        self.ready.extend(made);
        Ok(())
    }

    /// Tells the rules when the host's addresses have changed.
    fn look_at_host(&mut self) -> Result<(), Error> {
        let now = self.own.at(Instant::now());
        if *now != self.known_own {
            self.tools.nft(&rules::own(now))?;
            self.known_own.clone_from(now);
        }
        Ok(())
    }
}

/// Makes the veth pair under the first free name on the host.
fn link(tools: &Tools) -> Result<Ends, Error> {
    let host = std::process::id();
    for index in 0..MAX_DAEMONS {
        let name = Ends::new(index).name();
        let made = tools
            .ip(&format!("link add {UPLINK} mtu {MTU} type veth peer name {name} mtu {MTU} netns {host}\n"));
        match made {
            Ok(()) => return Ok(Ends::new(index)),
            Err(Error::Tool { said, .. }) if said.contains("File exists") => {}
            Err(error) => return Err(error),
        }
    }
    Err(Error::TooMany(MAX_DAEMONS))
}

/// Commands that bring up a tap and lead its guest's addresses there. Guests neither ask nor answer for MAC addresses: a kernel
/// without ARP addresses its frames to itself, so the tap has its guest's own address.
fn interface(place: Place) -> String {
    let Place { number, ipv4 } = place;
    let (name, guest) = (name_of(number), mac(mac_of(ipv4)));
    let mut text = format!(
        "link set {name} address {guest} mtu {MTU} txqueuelen {QUEUE} up
route add {ipv4}/32 dev {name}
neighbour add {ipv4} lladdr {guest} dev {name} nud permanent
"
    );
    if has_ipv6() {
        let ipv6 = ipv6_of(ipv4);
        let _ = write!(
            text,
            "route add {ipv6}/128 dev {name}\nneighbour add {ipv6} lladdr {guest} dev {name} nud permanent\n"
        );
    }
    text
}

fn mac(address: [u8; 6]) -> String {
    address.map(|byte| format!("{byte:02x}")).join(":")
}
