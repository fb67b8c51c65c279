//! What every guest's network looks like from inside: constants, so that a template is right on any host.
//!
//! The template's NIC has no address of its own. Guests get one as a single host (/32, /128), route everything through
//! [`GATEWAY`] and resolve names there; whatever answers for these addresses is the host's choice.

use core::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// Router and resolver of every guest, on the link.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// The same for IPv6.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// The host's loopback, if the guest may reach it.
pub const HOST: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 2);

/// A template's own address while it is built. It stays on every fork's loopback device: what still uses it is a
/// connection from before the fork, and is reset.
pub const TEMPLATE: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 3);

/// The same for IPv6.
pub const TEMPLATE_V6: Ipv6Addr = ipv6_of(TEMPLATE);

/// MAC address of the router.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0x66, 0, 0, 0, 1];

/// MAC address of every template.
pub const TEMPLATE_MAC: [u8; 6] = mac_of(TEMPLATE);

/// Largest IP packet of a guest whose network is in user space: nothing has to be cut for a wire that is not there.
pub const MTU: u16 = 65_520;

/// Name of [`HOST`].
pub const HOST_NAME: &str = "host.forkling.internal";

/// A fork's place in the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its address, from which [`mac_of`] and [`ipv6_of`] derive the others.
    pub ipv4: Ipv4Addr,
}

/// MAC address of the guest with an IPv4 address: locally administered, the address in its last four bytes.
pub const fn mac_of(ipv4: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = ipv4.octets();
    [0x02, 0x66, a, b, c, d]
}

/// IPv6 address of the guest with an IPv4 address: unique local (RFC 4193), the address in its last four bytes.
pub const fn ipv6_of(ipv4: Ipv4Addr) -> Ipv6Addr {
    let [a, b, c, d] = ipv4.octets();
    let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    Ipv6Addr::new(0xfd66, 0x6f72, 0x6b6c, 0, 0, 0, high, low)
}
