//! virtio devices over the memory-mapped transport (virtio 1.2, OASIS, section 4.2).
//!
//! A device is a plain value behind its transport's lock. All of them complete every chain they take before the lock
//! is let go, so at rest nothing is in flight and [`VirtioDevice::save`] needs no handshake.
//!
//! A driver that breaks the rules gets DEVICE_NEEDS_RESET and a configuration interrupt; its device does nothing more
//! until it is reset. The host side never panics for it.

use std::fmt::Debug;

pub mod chain;
pub mod mmio;
pub mod net;
pub mod pmem;
pub mod queue;
pub mod rng;
pub mod vsock;

use crate::devices::Error;

pub use chain::Chain;
pub use mmio::MmioTransport;
pub use queue::Queues;

/// What only the device itself knows. Every method is called with the device's lock held.
pub trait VirtioDevice: Send {
    /// The device's own part of the state; the transport and the queues are saved by the transport.
    type State: Clone + Debug + PartialEq;

    /// Device type (virtio 1.2, section 5).
    const ID: u32;

    /// Largest size of each queue in entries, powers of two.
    const QUEUE_SIZES: &'static [u16];

    /// Queues, one bit each, of whose completions the driver needs to hear by the next interrupt only, or in a moment: all
    /// they tell is that buffers may be used again.
    const LAZY_QUEUES: u32 = 0;

    /// Whether the vCPU that kicks does the work itself, for devices that have little to do and seldom: neither the host nor the guest has
    /// anything of a thread in between, and a guest at rest does not lose its rest by it.
    const BY_VCPU: bool = false;

    /// Device-specific feature bits offered (0 to 23 and 50 to 63).
    fn features(&self) -> u64;

    /// Reads configuration space from byte `offset`; bytes beyond its end read as 0.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes configuration space. Errors: the field is read-only.
    fn write_config(&mut self, offset: u64, data: &[u8]) -> Result<(), Violation>;

    /// The driver set DRIVER_OK; every ready queue is valid.
    fn activate(&mut self);

    /// The device-specific and other features that a driver that runs has agreed to; told before [`Self::activate`], and
    /// after a restore or a rewind to a driver that runs.
    fn agreed(&mut self, _features: u64) {}

    /// Back to the state after power-on, without work in flight and without host resources of the guest's making.
    fn reset(&mut self);

    /// Does all that can be done now, on all queues: the driver kicked, a host resource became ready, or a restored
    /// device starts.
    fn process(&mut self, queues: &mut Queues<'_>) -> Result<(), Violation>;

    /// The guest-visible state.
    fn save(&self) -> Self::State;

    /// Goes to a saved state in place, like a restore with the backend it has; called right after [`Self::reset`].
    /// Errors: as for a restore.
    fn rewind(&mut self, state: &Self::State) -> Result<(), Error>;
}

/// What a driver did wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A status write that is no step of virtio 1.2, 3.1.1.
    #[error("status {to:#x} written over {from:#x}")]
    Status {
        /// Before.
        from: u32,
        /// Written.
        to: u32,
    },
    /// A register written in the wrong state, with a wrong width, or that cannot be written.
    #[error("register {0:#x} written at the wrong time or width")]
    Register(u64),
    /// A queue's size, alignment or address range is impossible.
    #[error("queue {0} has an impossible size or address")]
    QueueLayout(usize),
    /// The available ring claims more than the queue holds, or the ring cannot be read.
    #[error("queue {0} has an impossible ring index")]
    Ring(usize),
    /// A descriptor chain that loops, is longer than its queue, leaves RAM or mixes directions.
    #[error("queue {0} has a broken descriptor chain")]
    Chain(usize),
    /// A chain without room for what the device type requires.
    #[error("queue {0} has a chain too small for its request")]
    Short(usize),
    /// A frame shorter than an Ethernet header or longer than the longest IP packet, by the length of its packet.
    #[error("frame of {0} bytes with its header")]
    Frame(usize),
    /// A write to read-only configuration space.
    #[error("configuration written at {0:#x}, where nothing can be written")]
    Config(u64),
}

/// Copies configuration space `config` from `offset` on into `data`, zeros beyond its end.
fn copy_config(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
    let len = rest.len().min(data.len());
    data[..len].copy_from_slice(&rest[..len]);
}
