//! What makes a fork itself: ids, generations that never repeat on this host, entropy, and the mailbox that carries
//! them into the guest.

use forkling_proto::{mailbox, network::Network};
use rustix::rand::{GetRandomFlags, getrandom};

pub use generation::Generations;

mod generation;

/// What a caller chose for a fork; everything else is made here.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// Host name; the fork's name or id if none.
    pub hostname: Option<String>,
    /// Name.
    pub name: Option<String>,
    /// Environment of every command.
    pub env: Vec<(String, String)>,
    /// See [`mailbox::Header::param`].
    pub param: u64,
}

/// The identity of one fork at one activation.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Fork id, `f-` and 13 characters.
    pub id: String,
    /// Host name in the guest.
    pub hostname: String,
    /// 32 hex digits.
    pub machine_id: String,
    /// Counts activations on this host.
    pub generation: u64,
    /// Echoed by the acknowledgement.
    pub nonce: u64,
    /// Place in the network, if it has a NIC.
    pub network: Option<Network>,
    env: Vec<(String, String)>,
    param: u64,
}

impl Identity {
    /// A fresh identity with `generation`.
    pub fn new(choice: &Choice, generation: u64) -> Self {
        let id = format!("f-{}", base32(random()));
        let hostname = choice.hostname.clone().or_else(|| choice.name.clone()).unwrap_or_else(|| id.clone());
        Self {
            hostname,
            machine_id: machine_id(random()),
            generation,
            nonce: u64::from_le_bytes(random()),
            env: choice.env.clone(),
            param: choice.param,
            network: None,
            id,
        }
    }

    /// The same fork at a later activation: same id and names, new generation and nonce.
    pub fn renewed(&self, generation: u64) -> Self {
        Self { generation, nonce: u64::from_le_bytes(random()), ..self.clone() }
    }

    /// The same with a place in the network.
    #[must_use]
    pub fn on(self, network: Option<Network>) -> Self {
        Self { network, ..self }
    }

    /// The same with another machine id.
    #[must_use]
    pub fn with_new_machine_id(self) -> Self {
        Self { machine_id: machine_id(random()), ..self }
    }

    /// The mailbox, with fresh entropy; the clock is that of the activation.
    pub fn mailbox(&self) -> Result<Vec<u8>, mailbox::Error> {
        self.encode(random(), false)
    }

    /// The mailbox that only prepares the guest for its place in the network. It carries nothing secret.
    pub fn preparation(&self) -> Result<Vec<u8>, mailbox::Error> {
        self.encode([0; 64], true)
    }

    fn encode(&self, entropy: [u8; 64], prepare: bool) -> Result<Vec<u8>, mailbox::Error> {
        let header = mailbox::Header {
            generation: self.generation,
            nonce: self.nonce,
            param: self.param,
            wall_clock_ns: 0,
            entropy,
            prepare,
        };
        let identity = mailbox::Identity {
            id: self.id.clone(),
            hostname: self.hostname.clone(),
            machine_id: self.machine_id.clone(),
            env: self.env.clone(),
            network: self.network,
        };
        mailbox::encode(&header, &identity)
    }
}

/// Random bytes of the kernel.
///
/// # Panics
/// When the kernel has no `getrandom(2)`, which is older than KVM features this project needs.
pub fn random<const N: usize>() -> [u8; N] {
    let mut out = [0; N];
    let mut filled = 0;
    while filled < N {
        filled += getrandom(&mut out[filled..], GetRandomFlags::empty()).expect("getrandom(2) works");
    }
    out
}

/// 64 bits as 13 characters of lower-case RFC 4648 base32.
pub fn base32(bytes: [u8; 8]) -> String {
    const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let bits = u64::from_le_bytes(bytes);
    (0..13).map(|digit| char::from(ALPHABET[(bits >> (5 * digit)) as usize & 31])).collect()
}

/// Hex digits of a random UUID (RFC 9562 version 4), which is what `machine-id(5)` asks for.
fn machine_id(mut bytes: [u8; 16]) -> String {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
