//! The user-space network of all forks of a daemon: switch, NAT, resolver, egress policy.
//!
//! It runs as a process of its own (`forkd net`), because it parses what hostile guests send. It holds no guest memory,
//! no snapshot and no privilege: frames come and go on one socket for each guest, and leave as ordinary host sockets.
#![forbid(unsafe_code)]

pub mod control;
