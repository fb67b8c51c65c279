//! The guest's NIC: brought up once in the template, given its own addresses in each fork.
//!
//! A template's NIC is up and routes everything, but has no address: those of the template lie on the loopback device,
//! from where the kernel takes them as sources while the NIC has none. A fork adds its own to the NIC, and they are taken
//! from then on. Connections that were open in the template keep the template's address, which the host answers with
//! a reset; those within the guest live on.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use forkling_proto::network::{GATEWAY, GATEWAY_V6, Network, TEMPLATE, TEMPLATE_V6, ipv6_of, mac_of};

use crate::netlink::Netlink;

/// The only NIC's name.
const NIC: &str = "eth0";
const LOOPBACK: &str = "lo";
const RESOLVER: &str = "/etc/resolv.conf";

/// What no wire without other machines needs: a link-local address, the search for duplicates and for routers.
const SETTINGS: [(&str, &str); 4] =
    [("addr_gen_mode", "1"), ("accept_dad", "0"), ("accept_ra", "0"), ("router_solicitations", "0")];

/// Brings the NIC of a template up.
///
/// # Errors
/// There is no NIC, or the kernel or the root file system refuses.
pub fn bring_up() -> io::Result<()> {
    for (name, value) in SETTINGS {
        let path = format!("/proc/sys/net/ipv6/conf/{NIC}/{name}");
        // A kernel without IPv6 has none of them.
        if Path::new(&path).exists() {
            fs::write(path, value)?;
        }
    }
    let (nic, loopback) = (index_of(NIC)?, index_of(LOOPBACK)?);
    let mut netlink = Netlink::open()?;
    netlink.bring_up(nic);
    netlink.add_address(loopback, TEMPLATE.into());
    netlink.add_default_route(nic, GATEWAY.into());
    netlink.send()?;
    if has_ipv6() {
        netlink.add_address(loopback, TEMPLATE_V6.into());
        netlink.add_default_route(nic, GATEWAY_V6.into());
        netlink.send()?;
    }
    // A link may lead to a service that is not there.
    let _ = fs::remove_file(RESOLVER);
    fs::write(RESOLVER, format!("nameserver {GATEWAY}\n"))
}

/// The NIC, ready to be given addresses.
#[derive(Debug)]
pub struct Interface {
    netlink: Netlink,
    nic: u32,
    loopback: u32,
    ipv6: bool,
    /// The address it has: that of the fork from which this guest is forked again.
    current: Option<Network>,
}

impl Interface {
    /// The NIC as it is, if there is one. `current` is the identity that it was given last.
    ///
    /// # Errors
    /// The kernel has no routing socket to give.
    pub fn open(current: Option<Network>) -> io::Result<Option<Self>> {
        let Ok(nic) = index_of(NIC) else { return Ok(None) };
        let netlink = Netlink::open()?;
        Ok(Some(Self { netlink, nic, loopback: index_of(LOOPBACK)?, ipv6: has_ipv6(), current }))
    }

    /// Gives the NIC the addresses of `network`. Those of the guest's parent, if it was a fork itself, move to the
    /// loopback device, like a template's.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn apply(&mut self, network: Network) -> io::Result<()> {
        let Self { netlink, nic, loopback, ipv6, current } = self;
        let former = current.replace(network);
        if former == Some(network) {
            return Ok(());
        }
        netlink.set_mac(*nic, mac_of(network.ipv4));
        for address in addresses(network, *ipv6) {
            netlink.add_address(*nic, address);
        }
        for address in former.into_iter().flat_map(|former| addresses(former, *ipv6)) {
            netlink.remove_address(*nic, address);
            netlink.add_address(*loopback, address);
        }
        netlink.send()
    }
}

fn addresses(network: Network, ipv6: bool) -> impl Iterator<Item = IpAddr> {
    let v6 = ipv6.then(|| IpAddr::V6(ipv6_of(network.ipv4)));
    std::iter::once(IpAddr::V4(network.ipv4)).chain(v6)
}

fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6/conf").join(NIC).exists()
}

fn index_of(device: &str) -> io::Result<u32> {
    let text = fs::read_to_string(format!("/sys/class/net/{device}/ifindex"))?;
    text.trim().parse().map_err(|_| io::ErrorKind::InvalidData.into())
}
