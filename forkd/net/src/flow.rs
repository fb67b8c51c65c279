//! Flows: a guest's connections, and exchanges of datagrams, with something outside.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use crate::{control::Protocol, policy::Target, table::Key, tcp::Tcp, udp::Udp};

/// What a packet is matched to its flow by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowId {
    /// By which protocol.
    pub protocol: Protocol,
    /// The guest's port; of ICMP echo, its identifier.
    pub port: u16,
    /// Where to, as the guest knows it.
    pub remote: IpAddr,
    /// Port; 0 for ICMP.
    pub remote_port: u16,
}

impl FlowId {
    /// As policy sees it.
    pub fn target(&self) -> Target {
        let port = (self.protocol != Protocol::Icmp).then_some(self.remote_port);
        Target { protocol: self.protocol, address: self.remote, port }
    }
}

/// A flow.
#[derive(Debug)]
pub struct Flow {
    /// Whose.
    pub link: Key,
    /// Which.
    pub id: FlowId,
    /// The name that allowed it.
    pub name: Option<String>,
    /// What it is made of.
    pub kind: Kind,
    /// It stands in the queue of work.
    pub queued: bool,
    /// When the timer fires next for it.
    pub wake: Option<Instant>,
}

/// What a flow is made of.
#[derive(Debug)]
pub enum Kind {
    /// A connection.
    Tcp(Box<Tcp>),
    /// Datagrams, and ICMP echo by a ping socket.
    Udp(Box<Udp>),
}

/// What comes after a turn of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// It waits for events.
    Wait,
    /// It waits for events, or so long.
    WaitFor(Duration),
    /// It has more to do.
    Again,
    /// The link has no room; it waits for that.
    Room,
    /// It is over.
    End,
}
