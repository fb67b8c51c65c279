//! Which guest has which address.

use std::{
    collections::HashSet,
    net::Ipv4Addr,
    sync::{Arc, Mutex},
};

use forkling_proto::network::Network;
use ipnet::Ipv4Net;

/// Why an address cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not in the daemon's range.
    #[error("{address} is not in {range}, the range of this daemon's guests")]
    Outside {
        /// As asked for.
        address: Ipv4Addr,
        /// The range.
        range: Ipv4Net,
    },
    /// Another fork has it.
    #[error("{0} belongs to another fork")]
    InUse(Ipv4Addr),
    /// All are taken.
    #[error("all addresses of {0} are taken")]
    Exhausted(Ipv4Net),
}

/// The addresses of a range. Those handed out last are the last to be handed out again.
#[derive(Debug)]
pub struct Addresses {
    range: Ipv4Net,
    taken: Mutex<Taken>,
}

#[derive(Debug)]
struct Taken {
    addresses: HashSet<u32>,
    next: u32,
}

/// An address that is taken. Dropped, it is free.
#[derive(Debug)]
pub struct Address {
    address: Ipv4Addr,
    of: Arc<Addresses>,
}

impl Addresses {
    /// All addresses of `range` but its first and its last, which old programs take for networks.
    pub fn new(range: Ipv4Net) -> Arc<Self> {
        let next = u32::from(range.network());
        Arc::new(Self { range, taken: Mutex::new(Taken { addresses: HashSet::new(), next }) })
    }

    /// The range.
    pub fn range(&self) -> Ipv4Net {
        self.range
    }

    /// An address like those of guests, for one whose NIC is unplugged: it is not taken.
    pub fn sample(&self) -> Network {
        Network { ipv4: self.bounds().1.into() }
    }

    /// A free address.
    pub fn any(self: &Arc<Self>) -> Result<Address, Error> {
        let (first, last) = self.bounds();
        let mut taken = self.taken.lock().expect("no panic under this lock");
        for _ in first..=last {
            taken.next = if (first..last).contains(&taken.next) { taken.next + 1 } else { first };
            let candidate = taken.next;
            if taken.addresses.insert(candidate) {
                return Ok(Address { address: candidate.into(), of: self.clone() });
            }
        }
        Err(Error::Exhausted(self.range))
    }

    /// This address.
    pub fn claim(self: &Arc<Self>, address: Ipv4Addr) -> Result<Address, Error> {
        self.check(address)?;
        let mut taken = self.taken.lock().expect("no panic under this lock");
        if !taken.addresses.insert(address.into()) {
            return Err(Error::InUse(address));
        }
        Ok(Address { address, of: self.clone() })
    }

    /// Whether an address can be a guest's and is free now.
    pub fn check(&self, address: Ipv4Addr) -> Result<(), Error> {
        let (first, last) = self.bounds();
        if !(first..=last).contains(&address.into()) {
            return Err(Error::Outside { address, range: self.range });
        }
        let taken = self.taken.lock().expect("no panic under this lock");
        if taken.addresses.contains(&address.into()) { Err(Error::InUse(address)) } else { Ok(()) }
    }

    fn bounds(&self) -> (u32, u32) {
        (u32::from(self.range.network()) + 1, u32::from(self.range.broadcast()).saturating_sub(1))
    }
}

impl Address {
    /// A guest's place in the network with it.
    pub fn network(&self) -> Network {
        Network { ipv4: self.address }
    }
}

impl Drop for Address {
    fn drop(&mut self) {
        let mut taken = self.of.taken.lock().expect("no panic under this lock");
        taken.addresses.remove(&self.address.into());
    }
}

#[cfg(test)]
mod tests;
