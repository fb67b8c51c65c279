use std::net::{Ipv4Addr, Ipv6Addr};

use super::*;

/// The loopback device of every network namespace.
const LOOPBACK: u32 = 1;

#[test]
fn requests_have_the_kernels_layout() {
    let mut netlink = Netlink::open().unwrap();
    netlink.set_mac(3, [2, 1, 2, 3, 4, 5]);
    let link: [u8; 44] = [
        44, 0, 0, 0, 16, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, // header
        0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // ifinfomsg
        10, 0, 1, 0, 2, 1, 2, 3, 4, 5, 0, 0, // address, padded
    ];
    assert_eq!(netlink.requests, link);
    netlink.add_address(3, Ipv6Addr::LOCALHOST.into());
    let rest = &netlink.requests[link.len()..];
    assert_eq!(rest[..4], 72u32.to_ne_bytes());
    assert_eq!(rest[16..20], [10, 128, 0, 0]);
}

#[test]
fn the_kernel_answers_for_the_request_it_refuses() {
    let mut netlink = Netlink::open().unwrap();
    netlink.remove_address(LOOPBACK, Ipv4Addr::new(192, 0, 2, 77).into());
    let refused = netlink.send().unwrap_err().raw_os_error();
    // Without privilege it is not even looked for.
    assert!(matches!(refused, Some(libc::EADDRNOTAVAIL | libc::EPERM)), "{refused:?}");
    // What was refused is not sent again.
    assert!(netlink.requests.is_empty());
    netlink.bring_up(u32::MAX);
    assert!(netlink.send().is_err());
}
