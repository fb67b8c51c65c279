//! The header of a vsock packet (virtio 1.2, 5.10.6).
//!
//! Headers are read and written whole, through a checked [`Chain`](crate::devices::virtio::Chain): newer drivers spread
//! header and data over any number of descriptors, so no assumption is made on where one ends.

/// Length of a header in bytes.
pub const HEADER_SIZE: usize = 44;

/// The host's context id.
pub const HOST_CID: u64 = 2;

/// The guest's context id, the same in every fork: each has a host side of its own.
pub const GUEST_CID: u64 = 3;

/// The only socket type spoken.
pub const STREAM: u16 = 1;

/// Flag of [`op::SHUTDOWN`]: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;

/// Flag of [`op::SHUTDOWN`]: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;

/// Both directions.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// Operations.
pub mod op {
    /// Ask for a connection.
    pub const REQUEST: u16 = 1;
    /// Accept it.
    pub const RESPONSE: u16 = 2;
    /// Refuse or abort it, or confirm its orderly end.
    pub const RST: u16 = 3;
    /// End one or both directions.
    pub const SHUTDOWN: u16 = 4;
    /// Data.
    pub const RW: u16 = 5;
    /// Here is how much may be sent to me.
    pub const CREDIT_UPDATE: u16 = 6;
    /// How much may I send?
    pub const CREDIT_REQUEST: u16 = 7;
}

/// A packet header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of data after the header.
    pub len: u32,
    /// Socket type.
    pub kind: u16,
    /// Operation, one of [`op`].
    pub op: u16,
    /// Flags, of SHUTDOWN only.
    pub flags: u32,
    /// Receive buffer of the sender in bytes.
    pub buf_alloc: u32,
    /// Bytes the sender has taken out of that buffer since the connection began, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Decodes a header. Any 44 bytes are one; its fields are to be checked where they are used.
    pub fn from_bytes(bytes: &[u8; HEADER_SIZE]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    /// Encodes the header.
    pub fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// The two ports that name a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// Port on the host's side.
    pub host_port: u32,
    /// Port on the guest's side.
    pub guest_port: u32,
}

impl Key {
    /// The connection a packet from the guest belongs to.
    pub fn of_guest_packet(header: &Header) -> Self {
        Self { host_port: header.dst_port, guest_port: header.src_port }
    }

    /// A header to the guest, without data, flags or credit.
    pub fn header(self, op: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: GUEST_CID,
            src_port: self.host_port,
            dst_port: self.guest_port,
            kind: STREAM,
            op,
            ..Header::default()
        }
    }
}
