//! A fork's network: asked for, given, changed.

use std::sync::{Arc, Mutex};

use forkling_net::control::{Guest, Limits, Membership, Policy};
use forkling_proto::network::{ipv6_of, mac_of};

use crate::{
    api::{
        error::{Code, Error, chain},
        types::{BuildTemplate, ForkNetwork, ForkNetworkInfo},
    },
    engine::Engine,
    identity::Identity,
    network::{self, Address, AddressError, Bound, NewNic, Nic, rules},
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
    nic: Nic,
    address: Address,
    choice: Arc<NetworkChoice>,
    /// Rules that have replaced those of the choice.
    changed: Mutex<Option<Vec<String>>>,
}

impl NetworkChoice {
    /// That of forks whose request says nothing; nothing, if they would be refused.
    pub fn usual(engine: &Engine, spec: &BuildTemplate) -> Self {
        let egress = spec.network.egress.clone();
        let policy = policy(&egress).ok().filter(|policy| engine.network.supports(policy).is_ok());
        policy.map_or_else(Self::default, |policy| Self { egress, policy, ..Self::default() })
    }

    /// What it means for a fork with this identity and address.
    pub fn bound(&self, identity: &Identity, name: Option<&str>, address: &Address) -> Bound {
        let group = self.group.clone().map(|group| {
            let names = [Some(identity.hostname.as_str()), name, Some(&identity.id)];
            let mut names: Vec<_> = names.into_iter().flatten().map(str::to_ascii_lowercase).collect();
            names.dedup();
            Membership { group, names }
        });
        let guest = Guest { id: identity.id.clone(), ipv4: address.network().ipv4, group };
        Bound { guest, policy: self.policy.clone(), limits: self.limits }
    }
}

impl Attached {
    /// A fork's NIC with an address and what was asked for.
    pub fn new(nic: Nic, address: Address, choice: Arc<NetworkChoice>) -> Self {
        Self { nic, address, choice, changed: Mutex::default() }
    }

    /// Lets its frames pass. Once, when it has acknowledged.
    pub fn bind(&self, identity: &Identity, name: Option<&str>) {
        self.nic.bind(|| self.choice.bound(identity, name, &self.address));
    }

    /// Forgets its connections, as its guest did.
    pub async fn reset(&self) -> Result<(), Error> {
        self.nic.reset().await.map_err(|error| unavailable(&error))
    }

    /// As the API shows it.
    pub fn show(&self) -> ForkNetwork {
        let ipv4 = self.address.network().ipv4;
        let [a, b, c, d, e, f] = mac_of(ipv4);
        let mac = format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}");
        let changed = self.changed.lock().expect("no panic under this lock").clone();
        let egress = changed.unwrap_or_else(|| self.choice.egress.clone());
        let (group, backend) = (self.choice.group.clone(), self.nic.backend());
        ForkNetwork { mac, ipv4, ipv6: ipv6_of(ipv4), group, egress, backend }
    }

    /// With what it did, denials from number `denials_from` on.
    pub async fn inspect(&self, denials_from: u64) -> Result<ForkNetworkInfo, Error> {
        let report = self.nic.inspect(denials_from).await.map_err(|error| unavailable(&error))?;
        Ok(ForkNetworkInfo {
            network: self.show(),
            limits: self.choice.limits,
            counters: report.counters,
            denials: report.denials.into_iter().map(Into::into).collect(),
        })
    }

    /// Changes what it may reach.
    pub async fn set_egress(&self, engine: &Engine, egress: Vec<String>) -> Result<(), Error> {
        let policy = policy(&egress)?;
        supported(engine, &policy)?;
        self.nic.set_policy(policy).await.map_err(|error| unavailable(&error))?;
        *self.changed.lock().expect("no panic under this lock") = Some(egress);
        Ok(())
    }
}

/// What rules mean.
pub fn policy(egress: &[String]) -> Result<Policy, Error> {
    rules::parse(egress)
        .map_err(|error| Error::new(Code::InvalidRule, "an egress rule is not valid").because(error))
}

/// Whether this daemon's forks may have such a policy.
pub fn supported(engine: &Engine, policy: &Policy) -> Result<(), Error> {
    engine.network.supports(policy).map_err(|error| {
        Error::new(Code::NamesUnsupported, "TAP devices know no domain names").because(error)
    })
}

/// A NIC for a new fork of `zygote`, if it has one, with a certain address if `chosen`.
pub async fn wire(
    engine: &Engine,
    zygote: &Zygote,
    chosen: Option<std::net::Ipv4Addr>,
) -> Result<Option<NewNic>, network::Error> {
    if !zygote.has_nic() {
        return Ok(None);
    }
    engine.network.nic(chosen).await.map(Some)
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
    if let Some(error) = error.address() {
        return not_had(error);
    }
    if error.is_exhausted() {
        return Error::new(Code::TapsExhausted, error.to_string());
    }
    Error::new(Code::NetworkUnavailable, "the network of forks cannot be had").because(chain(error))
}
