//! Socket interfaces without a safe wrapper: vsock addresses and interface flags.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::check;

/// A non-blocking vsock listener on `port` for any context id (vsock(7)).
pub fn listen_vsock(port: u32) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
    let (address, len) = vsock_address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the kernel reads `len` bytes at the address, which is the whole structure.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) })?;
    rustix::net::listen(&socket, 64)?;
    Ok(socket)
}

/// A non-blocking vsock stream to `port` of the host; waits until the host accepts.
pub fn connect_vsock(port: u32) -> io::Result<OwnedFd> {
    let socket =
        rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    let (address, len) = vsock_address(libc::VMADDR_CID_HOST, port);
    // SAFETY: the kernel reads `len` bytes at the address, which is the whole structure.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) })?;
    rustix::io::ioctl_fionbio(&socket, true)?;
    Ok(socket)
}

fn vsock_address(context: u32, port: u32) -> (libc::sockaddr_vm, libc::socklen_t) {
    let address = libc::sockaddr_vm {
        svm_family: libc::AF_VSOCK as libc::sa_family_t,
        svm_reserved1: 0,
        svm_port: port,
        svm_cid: context,
        svm_zero: [0; 4],
    };
    (address, mem::size_of_val(&address) as libc::socklen_t)
}

/// Brings the loopback interface up; the kernel gives it 127.0.0.1 and ::1 by itself (netdevice(7)).
pub fn bring_up_loopback() -> io::Result<()> {
    let socket =
        rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: libc::IFF_UP as libc::c_short },
    };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    // SAFETY: the kernel reads the name and flags of `request`, both initialised.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as libc::Ioctl, &raw const request) })?;
    Ok(())
}
