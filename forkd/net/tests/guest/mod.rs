//! A net process on a thread, and guests at the other ends of its links.
#![allow(dead_code, reason = "each test program uses a part")]

use std::{
    collections::VecDeque,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use forkling_net::control::{
    Destination, FromNet, Guest as Who, Limits, Membership, Policy, Report, Rule, Settings, ToNet,
};
use forkling_proto::network::{GATEWAY_MAC, MTU, mac_of};
use forkling_vmm::channel::Channel;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};
use smoltcp::{
    iface::{Config, Interface, SocketHandle, SocketSet},
    phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken},
    socket::tcp::{Socket, SocketBuffer, State},
    time::Instant as SmolInstant,
    wire::{EthernetAddress, HardwareAddress, IpCidr},
};

pub const PATIENCE: Duration = Duration::from_secs(10);

/// What guests have addresses of.
pub const GUESTS: &str = "100.100.0.0/16";

pub fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

pub fn host_rule() -> Rule {
    Rule { to: Destination::Host, protocol: None, ports: vec![] }
}

pub fn name_rule(name: &str) -> Rule {
    Rule { to: Destination::Name(name.into()), protocol: None, ports: vec![] }
}

pub fn net_rule(net: &str) -> Rule {
    Rule { to: Destination::Net(net.parse().unwrap()), protocol: None, ports: vec![] }
}

/// What, name, address, port.
pub type Denied = (String, Option<String>, Option<IpAddr>, Option<u16>);

/// The net process.
pub struct Net {
    channel: Option<Channel>,
    thread: Option<JoinHandle<()>>,
}

impl Net {
    pub fn start(resolvers: Vec<SocketAddr>) -> Self {
        let (ours, theirs) = pair();
        let thread = std::thread::spawn(|| forkling_net::serve(theirs).unwrap());
        let net = Self { channel: Some(Channel::new(ours)), thread: Some(thread) };
        net.tell(&ToNet::Start(Settings { guests: GUESTS.parse().unwrap(), resolvers }));
        assert!(matches!(net.answer(), FromNet::Started));
        net
    }

    pub fn tell(&self, message: &ToNet) {
        self.channel.as_ref().unwrap().send(message, &[]).unwrap();
    }

    pub fn answer(&self) -> FromNet {
        self.channel.as_ref().unwrap().receive().unwrap().expect("the net process is gone").0
    }

    pub fn guest(&self, number: u8, rules: Vec<Rule>) -> Guest {
        self.guest_with(number, rules, None, Limits::default())
    }

    pub fn guest_with(
        &self,
        number: u8,
        rules: Vec<Rule>,
        group: Option<Membership>,
        limits: Limits,
    ) -> Guest {
        self.guest_at(number.into(), Ipv4Addr::new(100, 100, 0, number), rules, group, limits)
    }

    pub fn guest_at(
        &self,
        link: u64,
        ipv4: Ipv4Addr,
        rules: Vec<Rule>,
        group: Option<Membership>,
        limits: Limits,
    ) -> Guest {
        let (ours, theirs) = pair();
        self.channel.as_ref().unwrap().send(&ToNet::Attach { link }, &[theirs.as_fd()]).unwrap();
        let guest = Who { id: format!("fork-{link}"), ipv4, group };
        self.tell(&ToNet::Bind { link, guest, policy: Policy { rules }, limits });
        Guest::new(ours, ipv4, link)
    }

    pub fn set_policy(&self, guest: &Guest, rules: Vec<Rule>) {
        self.tell(&ToNet::SetPolicy { request: 5, link: guest.link, policy: Policy { rules } });
        assert!(matches!(self.answer(), FromNet::Done { request: 5 }));
    }

    pub fn inspect(&self, link: u64) -> Option<Report> {
        self.tell(&ToNet::Inspect { request: 7, link, denials_from: 0 });
        match self.answer() {
            FromNet::Report { request: 7, report } => Some(*report),
            FromNet::NoLink { request: 7 } => None,
            other => panic!("{other:?}"),
        }
    }

    pub fn report(&self, guest: &Guest) -> Report {
        self.inspect(guest.link).unwrap()
    }

    /// Waits until the report of a guest is as wanted.
    pub fn await_report(&self, guest: &Guest, wanted: impl Fn(&Report) -> bool) -> Report {
        let start = Instant::now();
        loop {
            let report = self.report(guest);
            if wanted(&report) {
                return report;
            }
            assert!(start.elapsed() < PATIENCE, "not in time: {report:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What a guest was denied.
    pub fn denied(&self, guest: &Guest) -> Vec<Denied> {
        self.report(guest).denials.into_iter().map(|d| (d.what, d.name, d.address, d.port)).collect()
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.channel = None;
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.expect("the net process panicked");
        }
    }
}

pub struct Wire {
    pub frames: OwnedFd,
    received: VecDeque<Vec<u8>>,
    unsent: VecDeque<Vec<u8>>,
}

impl Wire {
    fn exchange(&mut self) {
        while let Some(packet) = self.unsent.front() {
            if rustix::net::send(&self.frames, packet, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).is_err() {
                break;
            }
            self.unsent.pop_front();
        }
        let mut buffer = vec![0; 70_000];
        while self.received.len() < 32 {
            match rustix::net::recv(&self.frames, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((_, length)) if length > 12 => self.received.push_back(buffer[12..length].to_vec()),
                _ => break,
            }
        }
    }
}

pub struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

pub struct Sender<'a>(&'a mut VecDeque<Vec<u8>>);

impl TxToken for Sender<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut packet = vec![0; 12 + length];
        let result = f(&mut packet[12..]);
        self.0.push_back(packet);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sender<'a>;

    fn receive(&mut self, _: SmolInstant) -> Option<(Received, Sender<'_>)> {
        let packet = self.received.pop_front()?;
        Some((Received(packet), Sender(&mut self.unsent)))
    }

    fn transmit(&mut self, _: SmolInstant) -> Option<Sender<'_>> {
        (self.unsent.len() < 64).then_some(Sender(&mut self.unsent))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = usize::from(MTU) + 14;
        // As with VIRTIO_NET_HDR_F_DATA_VALID.
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

/// A guest.
pub struct Guest {
    pub link: u64,
    pub ipv4: Ipv4Addr,
    pub wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    start: Instant,
    next_port: u16,
}

impl Guest {
    fn new(frames: OwnedFd, ipv4: Ipv4Addr, link: u64) -> Self {
        let mut wire = Wire { frames, received: VecDeque::new(), unsent: VecDeque::new() };
        let config = Config::new(HardwareAddress::Ethernet(EthernetAddress(mac_of(ipv4))));
        let mut interface = Interface::new(config, &mut wire, SmolInstant::ZERO);
        // This stack believes no neighbour that is outside of its network, so all are inside.
        interface.update_ip_addrs(|a| a.push(IpCidr::new(ipv4.into(), 0)).unwrap());
        let (sockets, start) = (SocketSet::new(vec![]), Instant::now());
        Self { link, ipv4, wire, interface, sockets, start, next_port: 40_000 }
    }

    pub fn poll(&mut self) {
        self.wire.exchange();
        let now = SmolInstant::from_micros(self.start.elapsed().as_micros() as i64);
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
        self.wire.exchange();
    }

    /// Polls until something is there.
    pub fn until<T>(&mut self, what: &str, mut look: impl FnMut(&mut Self) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            self.poll();
            if let Some(found) = look(self) {
                return found;
            }
            assert!(start.elapsed() < PATIENCE, "not in time: {what}");
            if self.wire.received.is_empty() {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    pub fn dial(&mut self, to: impl Into<SocketAddr>) -> SocketHandle {
        let ring = || SocketBuffer::new(vec![0; 128 * 1024]);
        let handle = self.sockets.add(Socket::new(ring(), ring()));
        self.next_port += 1;
        let socket = self.sockets.get_mut::<Socket<'_>>(handle);
        socket.connect(self.interface.context(), to.into(), self.next_port).unwrap();
        handle
    }

    pub fn tcp(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub fn state(&mut self, handle: SocketHandle) -> State {
        self.tcp(handle).state()
    }

    pub fn connect(&mut self, to: impl Into<SocketAddr>) -> SocketHandle {
        let handle = self.dial(to);
        self.until("a connection", |g| g.tcp(handle).may_send().then_some(()));
        handle
    }

    /// Whether a connection comes about.
    pub fn connects(&mut self, to: impl Into<SocketAddr>) -> bool {
        let handle = self.dial(to);
        let state = self.until("an answer to a SYN", |g| {
            let state = g.state(handle);
            (state != State::SynSent).then_some(state)
        });
        self.tcp(handle).abort();
        self.poll();
        state == State::Established
    }

    /// Sends all of `data` and reads as much, at the same time.
    pub fn echo(&mut self, handle: SocketHandle, data: &[u8]) -> Vec<u8> {
        let (mut sent, mut back) = (0, Vec::new());
        self.until("an echo", |g| {
            let socket = g.tcp(handle);
            if socket.can_send() {
                sent += socket.send_slice(&data[sent..]).unwrap();
            }
            if socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), back.extend_from_slice(bytes))).unwrap();
            }
            (back.len() >= data.len()).then_some(())
        });
        back
    }

    /// Reads until the other side has ended.
    pub fn read_to_end(&mut self, handle: SocketHandle) -> Vec<u8> {
        let mut back = Vec::new();
        self.until("the end", |g| {
            let socket = g.tcp(handle);
            if socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), back.extend_from_slice(bytes))).unwrap();
            }
            (!socket.may_recv()).then_some(())
        });
        back
    }

    /// Sends a frame as it is, behind an empty virtio header.
    pub fn raw(&self, frame: &[u8]) {
        self.packet(&[&[0; 12], frame].concat());
    }

    /// Sends a packet as it is.
    pub fn packet(&self, packet: &[u8]) {
        rustix::net::send(&self.wire.frames, packet, SendFlags::NOSIGNAL).unwrap();
    }

    /// The next packet for which `wanted` returns something; `None` if there is none in `patience`.
    pub fn hear<T>(&self, patience: Duration, wanted: impl Fn(&[u8]) -> Option<T>) -> Option<T> {
        let (start, mut buffer) = (Instant::now(), vec![0; 70_000]);
        while start.elapsed() < patience {
            match rustix::net::recv(&self.wire.frames, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((_, length)) if length > 26 => {
                    if let Some(found) = wanted(&buffer[12..length]) {
                        return Some(found);
                    }
                }
                _ => std::thread::sleep(Duration::from_micros(200)),
            }
        }
        None
    }

    /// A frame of this guest around an IPv4 payload, with right lengths and checksums of its header.
    pub fn frame(&self, from: Ipv4Addr, to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
        ipv4_frame(mac_of(self.ipv4), from, to, protocol, payload)
    }

    /// A UDP frame of this guest.
    pub fn datagram(&self, port: u16, to: SocketAddr, data: &[u8]) -> Vec<u8> {
        let IpAddr::V4(address) = to.ip() else { panic!() };
        self.frame(self.ipv4, address, 17, &udp(port, to.port(), data))
    }

    /// Sends a datagram; the data of the answer to it, if there is one.
    pub fn exchange(&self, port: u16, to: SocketAddr, data: &[u8], patience: Duration) -> Option<Vec<u8>> {
        self.raw(&self.datagram(port, to, data));
        self.hear(patience, |frame| {
            let ip = &frame[14..];
            let matches = frame[12..14] == [8, 0]
                && ip[9] == 17
                && IpAddr::from([ip[12], ip[13], ip[14], ip[15]]) == to.ip()
                && ip[20..24] == [to.port().to_be_bytes(), port.to_be_bytes()].concat();
            matches.then(|| ip[28..].to_vec())
        })
    }
}

/// A UDP header and data, without a checksum.
pub fn udp(from: u16, to: u16, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for field in [from, to, data.len() as u16 + 8, 0] {
        bytes.extend_from_slice(&field.to_be_bytes());
    }
    [&bytes, data].concat()
}

/// A TCP header without options or data.
pub fn segment(from: u16, to: u16, flags: u8) -> Vec<u8> {
    let mut bytes = [from.to_be_bytes(), to.to_be_bytes()].concat();
    bytes.extend_from_slice(&[0, 0, 0, 9, 0, 0, 0, 0, 0x50, flags, 255, 255, 0, 0, 0, 0]);
    bytes
}

pub fn ipv4_frame(mac: [u8; 6], from: Ipv4Addr, to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0];
    ip.extend_from_slice(&from.octets());
    ip.extend_from_slice(&to.octets());
    ip[2..4].copy_from_slice(&(20 + payload.len() as u16).to_be_bytes());
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum);
    [&GATEWAY_MAC[..], &mac, &[8, 0], &ip, payload].concat()
}

/// An IPv6 frame of a guest.
pub fn ipv6_frame(guest: &Guest, from: Ipv6Addr, to: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = [&GATEWAY_MAC[..], &mac_of(guest.ipv4), &[0x86, 0xdd, 0x60, 0, 0, 0]].concat();
    frame.extend_from_slice(&(payload.len() as u16).to_be_bytes());
    frame.extend_from_slice(&[next, 255]);
    frame.extend_from_slice(&from.octets());
    frame.extend_from_slice(&to.octets());
    frame.extend_from_slice(payload);
    frame
}

pub fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 =
        bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | u32::from(*c.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// Bytes that are not the same anywhere else.
pub fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}
