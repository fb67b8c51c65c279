//! What a snapshot keeps of a transport and its queues. Untrusted when it is read back.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};

use super::registers::{self, Registers};
use super::{CONFIG_CHANGE, USED_BUFFER};
use crate::memory::GuestRam;

/// A virtio device: transport, queues, and the device's own part `S`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmioState<S> {
    /// Device status register.
    pub status: u32,
    /// DeviceFeaturesSel register.
    pub device_features_sel: u32,
    /// DriverFeaturesSel register.
    pub driver_features_sel: u32,
    /// Features the driver accepted.
    pub driver_features: u64,
    /// QueueSel register.
    pub queue_sel: u32,
    /// InterruptStatus register.
    pub interrupt_status: u32,
    /// The queues, by index.
    pub queues: Vec<QueueState>,
    /// The device itself.
    pub device: S,
}

/// A virtqueue. Ring contents are in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// Entries, a power of two.
    pub size: u16,
    /// Whether the queue is in use.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest-physical address of the available ring.
    pub avail_ring: u64,
    /// Guest-physical address of the used ring.
    pub used_ring: u64,
    /// Next position in the available ring.
    pub next_avail: u16,
    /// Next position in the used ring.
    pub next_used: u16,
}

impl From<&Queue> for QueueState {
    fn from(queue: &Queue) -> Self {
        let virtio_queue::QueueState {
            // These two follow from the device type and from the features.
            max_size: _,
            event_idx_enabled: _,
            next_avail,
            next_used,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        } = queue.state();
        Self { size, ready, desc_table, avail_ring, used_ring, next_avail, next_used }
    }
}

impl<S> MmioState<S> {
    /// The state of these parts.
    pub(super) fn new(registers: &Registers, interrupt_status: u32, queues: &[Queue], device: S) -> Self {
        let Registers { status, device_features_sel, driver_features_sel, driver_features, queue_sel } =
            *registers;
        Self {
            status,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            interrupt_status,
            queues: queues.iter().map(QueueState::from).collect(),
            device,
        }
    }

    /// The registers, if a driver can have brought them there. Errors: the impossible field.
    pub(super) fn registers(&self, offered: u64) -> Result<Registers, &'static str> {
        let progress = self.status & !(registers::NEEDS_RESET | registers::FAILED);
        if !matches!(progress, 0 | 1 | 3 | 11 | 15) {
            return Err("status");
        }
        let agreed = progress & registers::FEATURES_OK != 0;
        let acceptable =
            self.driver_features & !offered == 0 && self.driver_features & registers::VERSION_1 != 0;
        if agreed && !acceptable || progress < 3 && self.driver_features != 0 {
            return Err("driver_features");
        }
        Ok(Registers {
            status: self.status,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            queue_sel: self.queue_sel,
        })
    }

    /// The InterruptStatus register, if it has no unknown bits.
    pub(super) fn interrupt_status(&self) -> Result<u32, &'static str> {
        let known = self.interrupt_status & !(USED_BUFFER | CONFIG_CHANGE) == 0;
        if known { Ok(self.interrupt_status) } else { Err("interrupt_status") }
    }

    /// The queues, if they can be those of a device with queue sizes `max_sizes` and lie in RAM. Ring contents are
    /// not looked at: that would fault in pages, and every use of them is checked anyway.
    pub(super) fn queues(
        &self,
        max_sizes: &[u16],
        registers: &Registers,
        ram: &GuestRam,
    ) -> Result<Vec<Queue>, &'static str> {
        if self.queues.len() != max_sizes.len() {
            return Err("queues");
        }
        let is_running = registers.status & registers::DRIVER_OK != 0;
        let event_idx_enabled = is_running && registers.has(registers::EVENT_IDX);
        let restore = |(state, &max_size): (&QueueState, &u16)| {
            let queue = state.restore(max_size, event_idx_enabled)?;
            if queue.ready() && registers.status & registers::FEATURES_OK == 0 {
                return Err("queues.ready");
            }
            if queue.ready() && !registers::is_in_ram(&queue, ram) {
                return Err("queues.address");
            }
            // A device completes what it takes before it can be saved, unless its driver broke off the work.
            let is_sound = registers.status & registers::NEEDS_RESET == 0;
            if is_sound && state.next_avail != state.next_used || !is_running && state.next_avail != 0 {
                return Err("queues.next_avail");
            }
            Ok(queue)
        };
        self.queues.iter().zip(max_sizes).map(restore).collect()
    }
}

impl QueueState {
    fn restore(&self, max_size: u16, event_idx_enabled: bool) -> Result<Queue, &'static str> {
        let Self { size, ready, desc_table, avail_ring, used_ring, next_avail, next_used } = *self;
        let untrusted = virtio_queue::QueueState {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        };
        Queue::try_from(untrusted).map_err(|_| "queues.layout")
    }
}
