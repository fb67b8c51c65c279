//! Messages between `forkd` and its net process, over one `SOCK_SEQPACKET` socket, which is the process's standard
//! input: packets of [`forkling_vmm::channel::Channel`], each with the descriptors its variant names.
//!
//! A *link* is one guest's NIC. Its frame socket is `SOCK_SEQPACKET` too; each packet is a `virtio_net_hdr_v1` of 12
//! bytes (virtio 1.2, 5.1.6; little-endian, `num_buffers` is 0 towards the net process and ignored from it) and one
//! Ethernet frame, at most [`MAX_PACKET`] bytes together; or a [`forkling_vmm::arena::Message`], which is shorter than any
//! packet.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

/// Longest packet on a frame socket: header, Ethernet header, and an IP packet of the largest size there is.
pub const MAX_PACKET: usize = 12 + 14 + 65_535;

/// To the net process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToNet {
    /// First message. Answered by [`FromNet::Started`].
    Start(Settings),
    /// A new link. Descriptor: its frame socket. Nothing is read from it until it is bound, so what the guest sends
    /// before waits there. No answer.
    Attach {
        /// Chosen by `forkd`, never used again.
        link: u64,
    },
    /// The guest of a link has an identity from now on. Sent once for each link. No answer.
    Bind {
        /// Which.
        link: u64,
        /// Who it is.
        guest: Guest,
        /// What it may reach.
        policy: Policy,
        /// How much of it.
        limits: Limits,
    },
    /// Another policy for a bound link: flows it does not allow are reset. Answered by [`FromNet::Done`].
    SetPolicy {
        /// Repeated in the answer.
        request: u64,
        /// Which.
        link: u64,
        /// What it may reach from now on.
        policy: Policy,
    },
    /// The guest of a link went back to where it had no connections: its flows end without a word. Counters, denials,
    /// identity and policy stay. Frames it has sent before are thrown away unread, so the guest is to be unplugged
    /// meanwhile. Answered by [`FromNet::Done`].
    Reset {
        /// Repeated in the answer.
        request: u64,
        /// Which.
        link: u64,
    },
    /// Asks for [`FromNet::Report`].
    Inspect {
        /// Repeated in the answer.
        request: u64,
        /// Which.
        link: u64,
        /// Denials with this number and later ones are wanted.
        denials_from: u64,
    },
    /// The link's guest is gone: its flows end. A link whose frame socket is closed by the guest's side ends likewise.
    /// No answer.
    Detach {
        /// Which.
        link: u64,
    },
}

/// From the net process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromNet {
    /// It serves.
    Started,
    /// The request was carried out.
    Done {
        /// As in the request.
        request: u64,
    },
    /// State of a link.
    Report {
        /// As in the request.
        request: u64,
        /// What it was asked for.
        report: Box<Report>,
    },
    /// There is no such link, or it is not bound.
    NoLink {
        /// As in the request.
        request: u64,
    },
}

/// What holds for all links.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Addresses of guests. One outside of the sender's own is never accepted from a guest; one inside is reached only
    /// by guests of the same group.
    pub guests: Ipv4Net,
    /// Resolvers that names are asked of, in turn. Empty: names resolve only to guests.
    pub resolvers: Vec<SocketAddr>,
}

/// Who a guest is. MAC and IPv6 address follow from the IPv4 address ([`forkling_proto::network`]).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// Fork id, for logs.
    pub id: String,
    /// Its address, in [`Settings::guests`]; or [`forkling_proto::network::TEMPLATE`], for a template that is built.
    pub ipv4: Ipv4Addr,
    /// Group whose members reach each other, and under which names it is known there. None: it reaches no guest.
    pub group: Option<Membership>,
}

/// A guest's place in its group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// Name of the group.
    pub group: String,
    /// Names of the guest in it: its host name, and its fork id or name where they differ. Lower case.
    pub names: Vec<String>,
}

/// What a guest may reach outside. Without rules: nothing. Order does not matter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// What is allowed.
    pub rules: Vec<Rule>,
}

/// One thing that is allowed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Where to.
    pub to: Destination,
    /// By which protocol; none: all of them.
    pub protocol: Option<Protocol>,
    /// To which ports, first and last; empty: all. Ports do not apply to ICMP echo.
    pub ports: Vec<(u16, u16)>,
}

/// Where a rule leads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Destination {
    /// Addresses. Special-purpose ranges (private, link-local, loopback, shared, multicast, reserved: the IANA
    /// special-purpose registries of RFC 6890) are reached only by a rule that lies within one of them, and an address
    /// of this host only by a rule for that single address.
    Net(IpNet),
    /// Addresses that our resolver gave for this name, as long as their TTL lasts; never special-purpose ones, nor those
    /// of this host. Lower case, no final dot. `*.` before a name stands for one or more labels.
    Name(String),
    /// This host's loopback, which guests know as [`forkling_proto::network::HOST`] and `host.forkling.internal`.
    Host,
}

/// What a rule allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP echo.
    Icmp,
}

/// How much of the network a guest may use. 0 means no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema), schema(as = NetworkLimits))]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// TCP connections, UDP and ICMP flows at a time.
    pub flows: u32,
    /// Bytes a second, each way.
    pub bytes_per_s: u64,
    /// Frames a second from the guest.
    pub frames_per_s: u32,
    /// Names looked up in a second. The default lets two hundred connections of one program begin at once, each with a question for either kind of
    /// address.
    pub names_per_s: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { flows: 1024, bytes_per_s: 0, frames_per_s: 0, names_per_s: 500 }
    }
}

/// State of a link.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Counters since it was bound.
    pub counters: Counters,
    /// Number of the next denial.
    pub next_denial: u64,
    /// The latest denials, oldest first, at most [`MAX_DENIALS`].
    pub denials: Vec<Denial>,
}

/// Denials kept for each link.
pub const MAX_DENIALS: usize = 64;

/// What a guest's NIC carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema), schema(as = NetworkCounters))]
pub struct Counters {
    /// Frames from the guest. On a TAP: packets that bear its address, in which the kernel may have put many segments together.
    pub frames_from_guest: u64,
    /// Bytes of them.
    pub bytes_from_guest: u64,
    /// Frames to the guest.
    pub frames_to_guest: u64,
    /// Bytes of them.
    pub bytes_to_guest: u64,
    /// Frames of the guest that were malformed, spoofed or fragmented.
    pub frames_refused: u64,
    /// Frames dropped for a limit or a full queue.
    pub frames_dropped: u64,
    /// Flows that are open.
    pub flows: u64,
    /// Flows opened.
    pub flows_opened: u64,
    /// Flows and names denied by policy.
    pub denied: u64,
    /// Flows and names refused for a limit.
    pub limited: u64,
    /// Names asked for.
    pub names_asked: u64,
}

/// Something a guest was denied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denial {
    /// Counts denials of the link, from 0.
    pub number: u64,
    /// Milliseconds since 1970.
    pub at_unix_ms: u64,
    /// What: `tcp`, `udp`, `icmp`, `dns`, `source`, `fragment`, or another IP protocol by number.
    pub what: String,
    /// The name asked for, or under which the address was resolved.
    pub name: Option<String>,
    /// The address.
    pub address: Option<IpAddr>,
    /// The port.
    pub port: Option<u16>,
}
