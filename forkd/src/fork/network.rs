//! A fork's network: asked for, given, changed.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
};

use forkling_net::control::{Guest, Limits, Membership, Policy};
use forkling_proto::network::{ipv6_of, mac_of};

use crate::{
    api::{
        error::{Code, Error, chain},
        types::{ForkNetwork, ForkNetworkInfo},
    },
    engine::Engine,
    identity::Identity,
    network::{self, Address, AddressError, Bound, Link, rules},
    zygote::Zygote,
};

/// A network as a caller asked for it, checked.
#[derive(Clone, Debug, Default)]
pub struct NetworkChoice {
    /// The rules as they were written, and what they mean.
    pub egress: Vec<String>,
    /// The same, understood.
    pub policy: Policy,
    /// Group.
    pub group: Option<String>,
    /// A certain address.
    pub ipv4: Option<std::net::Ipv4Addr>,
    /// How much it may use.
    pub limits: Limits,
}

/// The network of a living fork.
#[derive(Debug)]
pub struct Attached {
    link: Link,
    address: Address,
    choice: Arc<NetworkChoice>,
    /// Rules that have replaced those of the choice.
    changed: Mutex<Option<Vec<String>>>,
}

impl Attached {
    /// A fork's NIC with an address and what was asked for.
    pub fn new(link: Link, address: Address, choice: Arc<NetworkChoice>) -> Self {
        Self { link, address, choice, changed: Mutex::default() }
    }

    /// Lets its frames pass. Once, when it has acknowledged.
    pub fn bind(&self, identity: &Identity, name: Option<&str>) {
        let choice = &self.choice;
        let group = choice.group.clone().map(|group| {
            let names = [Some(identity.hostname.as_str()), name, Some(&identity.id)];
            let mut names: Vec<_> = names.into_iter().flatten().map(str::to_ascii_lowercase).collect();
            names.dedup();
            Membership { group, names }
        });
        let guest = Guest { id: identity.id.clone(), ipv4: self.address.network().ipv4, group };
        self.link.bind(Bound { guest, policy: choice.policy.clone(), limits: choice.limits });
    }

    /// Forgets its connections, as its guest did.
    pub async fn reset(&self) {
        self.link.reset().await;
    }

    /// As the API shows it.
    pub fn show(&self) -> ForkNetwork {
        let ipv4 = self.address.network().ipv4;
        let mac = mac_of(ipv4).map(|byte| format!("{byte:02x}")).join(":");
        let changed = self.changed.lock().expect("no panic under this lock").clone();
        let egress = changed.unwrap_or_else(|| self.choice.egress.clone());
        ForkNetwork { mac, ipv4, ipv6: ipv6_of(ipv4), group: self.choice.group.clone(), egress }
    }

    /// With what it did, denials from number `denials_from` on.
    pub async fn inspect(&self, denials_from: u64) -> Result<ForkNetworkInfo, Error> {
        let report = self.link.inspect(denials_from).await.map_err(|error| unavailable(&error))?;
        Ok(ForkNetworkInfo {
            network: self.show(),
            limits: self.choice.limits,
            counters: report.counters,
            denials: report.denials.into_iter().map(Into::into).collect(),
        })
    }

    /// Changes what it may reach.
    pub async fn set_egress(&self, egress: Vec<String>) -> Result<(), Error> {
        let policy = policy(&egress)?;
        self.link.set_policy(policy).await.map_err(|error| unavailable(&error))?;
        *self.changed.lock().expect("no panic under this lock") = Some(egress);
        Ok(())
    }
}

/// What rules mean.
pub fn policy(egress: &[String]) -> Result<Policy, Error> {
    rules::parse(egress)
        .map_err(|error| Error::new(Code::InvalidRule, "an egress rule is not valid").because(error))
}

/// A link for a new fork of `zygote` and the guest's end of it, if it has a NIC.
pub fn wire(engine: &Engine, zygote: &Zygote) -> Result<(Option<Link>, Option<OwnedFd>), network::Error> {
    if !zygote.has_nic() {
        return Ok((None, None));
    }
    engine.network.link().map(|(link, frames)| (Some(link), Some(frames)))
}

/// The error for an address that cannot be had.
pub fn not_had(error: &AddressError) -> Error {
    let code = match error {
        AddressError::Outside { .. } => Code::InvalidAddress,
        AddressError::InUse(_) | AddressError::Exhausted(_) => Code::AddressTaken,
    };
    Error::new(code, error.to_string())
}

/// The error for a network that cannot be had.
pub fn unavailable(error: &network::Error) -> Error {
    Error::new(Code::NetworkUnavailable, "the network of forks cannot be had").because(chain(error))
}
