//! What `forkd` tells the process: links come, get an identity and a policy, and go.

use std::{io, os::fd::OwnedFd};

use forkling_proto::network::TEMPLATE;
use forkling_vmm::channel::{self, Channel};

use crate::{
    Error,
    control::{FromNet, Guest, Limits, Policy, ToNet},
    flow::{Flow, Kind},
    link::{Bound, Link},
    policy::Verdict,
    server::{Net, Work},
    table::{self, Key},
};

impl Net {
    /// Does what `forkd` wants. Returns whether it still wants anything.
    pub fn hear(&mut self, channel: &Channel) -> Result<bool, Error> {
        loop {
            match channel.try_receive::<ToNet>() {
                Ok(Some((message, fds))) => self.obey(channel, message, fds)?,
                Ok(None) => return Ok(false),
                Err(channel::Error::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(true);
                }
                Err(channel::Error::Io(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok(false);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn obey(&mut self, channel: &Channel, message: ToNet, fds: Vec<OwnedFd>) -> Result<(), Error> {
        match message {
            ToNet::Start(_) => tracing::error!("started twice; the first settings hold"),
            ToNet::Attach { link } => self.attach(link, fds),
            ToNet::Bind { link, guest, policy, limits } => self.bind(link, guest, policy, limits),
            ToNet::SetPolicy { request, link, policy } => {
                let done = self.set_policy(link, policy);
                let answer = if done { FromNet::Done { request } } else { FromNet::NoLink { request } };
                channel.send(&answer, &[])?;
            }
            ToNet::Reset { request, link } => {
                let answer = match self.ids.get(&link) {
                    Some(&key) => {
                        self.reset(key);
                        FromNet::Done { request }
                    }
                    None => FromNet::NoLink { request },
                };
                channel.send(&answer, &[])?;
            }
            ToNet::Inspect { request, link, denials_from } => {
                let link = self.ids.get(&link).and_then(|key| self.links.get(*key));
                let answer = match link.and_then(|link| link.report(denials_from)) {
                    Some(report) => FromNet::Report { request, report: Box::new(report) },
                    None => FromNet::NoLink { request },
                };
                channel.send(&answer, &[])?;
            }
            ToNet::Detach { link } => {
                if let Some(&key) = self.ids.get(&link) {
                    self.detach(key);
                }
            }
        }
        Ok(())
    }

    pub(crate) fn attach(&mut self, id: u64, fds: Vec<OwnedFd>) {
        let Ok([frames]) = <[OwnedFd; 1]>::try_from(fds) else {
            return tracing::error!(link = id, "a link without its socket");
        };
        if self.ids.contains_key(&id) {
            return tracing::error!(link = id, "attached twice; the first holds");
        }
        let key = self.links.next_key();
        let watched = Link::new(id, frames).and_then(|link| {
            link.watch(self.poll.registry(), key.token(table::Kind::Link))?;
            Ok(link)
        });
        match watched {
            Ok(link) => drop(self.ids.insert(id, self.links.insert(link))),
            Err(error) => tracing::error!(link = id, %error, "a link cannot be watched"),
        }
    }

    pub(crate) fn bind(&mut self, id: u64, guest: Guest, policy: Policy, limits: Limits) {
        let Some(&key) = self.ids.get(&id) else { return };
        let Some(link) = self.links.get_mut(key).filter(|link| link.bound.is_none()) else {
            return tracing::error!(link = id, "bound twice; the first holds");
        };
        let is_template = guest.ipv4 == TEMPLATE;
        if !is_template && self.by_address.contains_key(&guest.ipv4) {
            return tracing::error!(link = id, address = %guest.ipv4, "two guests of one address; the first keeps it");
        }
        // Any number of templates may be built at a time, so theirs is nobody's to reach.
        if !is_template {
            self.by_address.insert(guest.ipv4, key);
            if let Some(membership) = &guest.group {
                self.groups.entry(membership.group.clone()).or_default().push(key);
            }
        }
        link.bound = Some(Box::new(Bound::new(guest, policy, limits, self.now)));
        self.enqueue(Work::Link(key));
    }

    pub(crate) fn set_policy(&mut self, id: u64, policy: Policy) -> bool {
        let Some(&key) = self.ids.get(&id) else { return false };
        let Some(bound) = self.bound_mut(key) else { return false };
        bound.policy = policy;
        let flows: Vec<Key> = bound.flows.values().copied().collect();
        for flow_key in flows {
            let Some(flow) = self.flows.get(flow_key) else { continue };
            if Bound::gateway(flow.id.remote) == flow.id.remote {
                continue;
            }
            let (target, name) = (flow.id.target(), flow.name.clone());
            let by_address = self.decide(key, target, None) != Verdict::Denied;
            if !by_address && name.is_none_or(|name| self.decide(key, target, Some(&name)) == Verdict::Denied)
            {
                self.abort_flow(flow_key);
            }
        }
        true
    }

    /// Ends all flows of a link without a word to the guest, and throws away what it has sent and not been heard.
    pub(crate) fn reset(&mut self, key: Key) {
        let Some(link) = self.links.get_mut(key) else { return };
        link.discard();
        let Some(bound) = &mut link.bound else { return };
        bound.forget_names();
        bound.blocked.clear();
        for (_, flow) in std::mem::take(&mut bound.flows) {
            if let Some(Flow { kind: Kind::Tcp(tcp), .. }) = self.flows.get(flow) {
                tcp.reset_host();
            }
            self.flows.remove(flow);
        }
    }

    /// Frees a link and all it has.
    pub fn detach(&mut self, key: Key) {
        self.reset(key);
        let Some(link) = self.links.remove(key) else { return };
        self.ids.remove(&link.id);
        let Some(bound) = link.bound else { return };
        if self.by_address.get(&bound.guest.ipv4) == Some(&key) {
            self.by_address.remove(&bound.guest.ipv4);
        }
        if let Some(group) = bound.guest.group.map(|membership| membership.group)
            && let Some(members) = self.groups.get_mut(&group)
        {
            members.retain(|member| *member != key);
            if members.is_empty() {
                self.groups.remove(&group);
            }
        }
    }
}
