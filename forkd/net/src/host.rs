//! Addresses of this host.

use std::{
    collections::HashSet,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::{Duration, Instant},
};

/// How old the list may be.
const AGE: Duration = Duration::from_secs(1);

/// All addresses of all interfaces.
#[derive(Debug)]
pub struct HostAddresses {
    addresses: HashSet<IpAddr>,
    read: Instant,
}

impl HostAddresses {
    /// Reads them.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn read(now: Instant) -> io::Result<Self> {
        Ok(Self { addresses: list()?, read: now })
    }

    /// The list, not older than a second; the last one that could be read.
    pub fn at(&mut self, now: Instant) -> &HashSet<IpAddr> {
        if now.saturating_duration_since(self.read) >= AGE {
            self.read = now;
            match list() {
                Ok(addresses) => self.addresses = addresses,
                Err(error) => {
                    tracing::error!(%error, "addresses of this host cannot be read; the last list holds")
                }
            }
        }
        &self.addresses
    }
}

fn list() -> io::Result<HashSet<IpAddr>> {
    let mut addresses = ipv4(&fs::read_to_string("/proc/net/fib_trie")?);
    match fs::read_to_string("/proc/net/if_inet6") {
        Ok(text) => addresses.extend(ipv6(&text)),
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    Ok(addresses)
}

/// Of the routing tables' dump: a line `|-- ADDRESS`, below it `/32 host LOCAL`.
fn ipv4(text: &str) -> HashSet<IpAddr> {
    let mut addresses = HashSet::new();
    let mut leaf = None;
    for line in text.lines().map(str::trim) {
        if let Some(address) = line.strip_prefix("|-- ") {
            leaf = address.parse::<Ipv4Addr>().ok();
        } else if line.starts_with("/32 host LOCAL") {
            addresses.extend(leaf.map(IpAddr::V4));
        }
    }
    addresses
}

/// Of lines that begin with an address of 32 hexadecimal digits.
fn ipv6(text: &str) -> impl Iterator<Item = IpAddr> {
    text.lines().filter_map(|line| {
        let digits = line.split_whitespace().next().filter(|digits| digits.len() == 32)?;
        u128::from_str_radix(digits, 16).ok().map(|bits| Ipv6Addr::from_bits(bits).into())
    })
}

#[cfg(test)]
mod tests;
