//! The user-space network of all forks of a daemon: switch, NAT, resolver, egress policy.
//!
//! It runs as a process of its own (`forkd net`), because it parses what hostile guests send. It holds no guest memory,
//! no snapshot and no privilege: frames come and go on one socket for each guest, and leave as ordinary host sockets.
#![forbid(unsafe_code)]

pub mod control;

/// x
pub fn run() -> std::io::Result<()> {
    use std::os::fd::AsFd;
    let fd = std::io::stdin().as_fd().try_clone_to_owned()?;
    let c = forkling_vmm::channel::Channel::new(fd);
    let mut keep = vec![];
    while let Ok(Some((m, fds))) = c.receive::<control::ToNet>() {
        keep.extend(fds);
        if let control::ToNet::Start(_) = m {
            let _ = c.send(&control::FromNet::Started, &[]);
        }
    }
    Ok(())
}
