//! The gateway's resolver, as guests see it: policy first, then the cache, then the resolvers of the host.
//!
//! A name that policy does not allow never leaves the host. One that a wildcard allows does, and with it whatever a guest
//! writes into its labels: `*.example.org` is by nature a way to send data to the owner of `example.org`, as is a
//! connection there. [`crate::control::Limits::names_per_s`] bounds its rate.

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
pub mod message;
pub mod resolver;
pub mod stream;

use std::{
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use forkling_proto::network::{HOST, HOST_NAME, ipv6_of};

use self::{
    message::{Answer, Bad, Code, Query},
    resolver::{Cached, Progress},
};
use crate::{
    flow::Kind,
    link::Bound,
    policy::{self, World},
    server::{Net, Work},
    table::Key,
    wire,
};

/// Names of guests may carry this.
const SUFFIX: &str = ".forkling.internal";

/// An address holds under a name at least this long.
const SHORTEST: Duration = Duration::from_secs(5);

/// Names that a link may have asked of the host's resolvers at a time.
const ASKING: usize = 128;

/// Where an answer goes to.
#[derive(Clone, Copy, Debug)]
pub enum ReplyTo {
    /// To a port of the guest, from an address of the gateway.
    Udp(IpAddr, u16),
    /// Into a connection.
    Tcp(Key),
}

/// Who waits for an answer.
#[derive(Clone, Debug)]
pub struct Waiter {
    link: Key,
    query: Query,
    to: ReplyTo,
}

impl Net {
    /// Takes a guest's query.
    pub fn ask(&mut self, link: Key, bytes: &[u8], to: ReplyTo) {
        let now = self.now;
        let Some(bound) = self.bound_mut(link) else { return };
        let query = match message::parse(bytes) {
            Ok(query) => query,
            Err(Bad::Ignored) => return self.reply(link, to, None),
            Err(Bad::Answered(id, code)) => return self.reply(link, to, message::refusal(id, code)),
        };
        bound.counters.names_asked += 1;
        if !bound.names.one(now) {
            bound.counters.limited += 1;
            return self.reply(link, to, message::refusal(query.id, Code::ServerFailure));
        }
        let waiter = Waiter { link, query, to };
        match self.answer_here(link, &waiter.query) {
            Some(answer) => self.deliver(waiter, &Cached::now(answer, now)),
            None => self.ask_outside(waiter),
        }
    }

    /// The answer, if it does not need the host's resolvers.
    fn answer_here(&mut self, link: Key, query: &Query) -> Option<Answer> {
        let name = query.question.name.as_str();
        if name == HOST_NAME {
            return Some(Answer::of(query, HOST.into()));
        }
        if let Some(guest) = self.member(link, name.strip_suffix(SUFFIX).unwrap_or(name)) {
            let v6 = query.question.kind == message::TYPE_AAAA;
            let address = if v6 { ipv6_of(guest).into() } else { guest.into() };
            return Some(Answer::of(query, address));
        }
        let bound = self.bound_mut(link)?;
        if !policy::allows_name(&bound.policy, name) {
            bound.deny("dns", Some(name.to_owned()), None, None);
            return Some(Answer::empty(Code::NoName));
        }
        (!message::is_asked(query.question.kind)).then(|| Answer::empty(Code::NoError))
    }

    /// The guest of this name in the group of a link.
    fn member(&self, link: Key, name: &str) -> Option<Ipv4Addr> {
        let own = self.links.get(link)?.bound.as_ref()?;
        let group = &own.guest.group.as_ref()?.group;
        self.groups.get(group)?.iter().find_map(|&member| {
            let guest = &self.links.get(member)?.bound.as_ref()?.guest;
            let names = &guest.group.as_ref()?.names;
            names.iter().any(|known| known == name).then_some(guest.ipv4)
        })
    }

    fn ask_outside(&mut self, waiter: Waiter) {
        let (now, question) = (self.now, waiter.query.question.clone());
        if let Some(cached) = self.resolver.cached(&question, now) {
            return self.deliver(waiter, &cached);
        }
        let (link, id, to) = (waiter.link, waiter.query.id, waiter.to);
        let Some(bound) = self.bound_mut(link) else { return };
        let allowed = bound.asking < ASKING;
        let registry = self.poll.registry();
        let progress = if allowed { self.resolver.ask(&question, waiter, registry, now) } else { None };
        let Some(bound) = self.bound_mut(link) else { return };
        match progress {
            Some(progress) => {
                bound.asking += 1;
                self.on_progress(progress);
            }
            None => {
                bound.counters.limited += 1;
                self.reply(link, to, message::refusal(id, Code::ServerFailure));
            }
        }
    }

    /// A question has a turn.
    pub fn query_turn(&mut self, key: Key) {
        let progress = self.resolver.turn(key, self.poll.registry(), self.now);
        self.on_progress(progress);
    }

    fn on_progress(&mut self, progress: Progress) {
        match progress {
            Progress::Asked(key, deadline) => self.wake_at(deadline, Work::Query(key)),
            Progress::Answered(cached, waiters) => {
                for waiter in waiters {
                    if let Some(bound) = self.bound_mut(waiter.link) {
                        bound.asking = bound.asking.saturating_sub(1);
                    }
                    self.deliver(waiter, &cached);
                }
            }
            Progress::Gone => {}
        }
    }

    /// Answers: addresses that no name may lead to are left out, the others are opened.
    fn deliver(&mut self, waiter: Waiter, cached: &Cached) {
        let Waiter { link, query, to } = waiter;
        let (now, guests) = (self.now, self.settings.guests);
        let own = self.host.at(now);
        let Some(bound) = self.links.get_mut(link).and_then(|link| link.bound.as_mut()) else { return };
        let mut answer = cached.answer.clone();
        if !cached.here {
            let world = World { guests, own };
            answer.records.retain(|record| open(bound, &query, record, cached, world, now));
        }
        let age = u32::try_from(now.saturating_duration_since(cached.since).as_secs()).unwrap_or(u32::MAX);
        let room = if matches!(to, ReplyTo::Tcp(_)) { usize::from(u16::MAX) } else { query.room };
        let bytes = message::answer(&query, &answer, |ttl| ttl.saturating_sub(age), room);
        self.reply(link, to, bytes);
    }

    fn reply(&mut self, link: Key, to: ReplyTo, bytes: Option<Vec<u8>>) {
        match to {
            ReplyTo::Udp(gateway, port) => {
                let now = self.now;
                let (Some(link), Some(bytes)) = (self.links.get_mut(link), bytes) else { return };
                let Some(bound) = &link.bound else { return };
                let guest = bound.address(gateway);
                if let Some(packet) = wire::udp(bound.mac, (gateway, 53), (guest, port), &bytes) {
                    link.send_if_allowed(&packet, now);
                }
            }
            ReplyTo::Tcp(key) => {
                let Some(flow) = self.flows.get_mut(key) else { return };
                if let Kind::Tcp(tcp) = &mut flow.kind
                    && let Some(stream) = tcp.stream()
                {
                    stream.answer(bytes.as_deref());
                    self.enqueue(Work::Flow(key));
                }
            }
        }
    }
}

/// Opens the address in a record; `false` if no name may lead there.
fn open(
    bound: &mut Bound,
    query: &Query,
    record: &simple_dns::ResourceRecord<'_>,
    cached: &Cached,
    world: World<'_>,
    now: Instant,
) -> bool {
    let Some(address) = message::address(record) else { return true };
    let name = &query.question.name;
    if !world.is_public(address) {
        bound.deny("dns", Some(name.clone()), Some(address), None);
        return false;
    }
    let until = cached.since + Duration::from_secs(record.ttl.min(86_400).into());
    bound.open(address, name, until.max(now + SHORTEST), now);
    true
}
