//! The register file of the memory-mapped transport (virtio 1.2, 4.2.2) and its status state machine (2.1, 3.1.1).

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::Violation;
use crate::memory::GuestRam;

const MAGIC: u64 = 0x00;
const VERSION: u64 = 0x04;
/// Device type, 0 in an empty slot.
pub const DEVICE_ID: u64 = 0x08;
const VENDOR_ID: u64 = 0x0C;
/// Features offered, the word chosen by DeviceFeaturesSel.
pub const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SEL: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
/// Largest size of the selected queue, 0 if there is no such queue.
pub const QUEUE_NUM_MAX: u64 = 0x34;
const QUEUE_NUM: u64 = 0x38;
/// Whether the selected queue is in use.
pub const QUEUE_READY: u64 = 0x44;
/// Kick; the value is the queue's index.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// Why the device interrupted.
pub const INTERRUPT_STATUS: u64 = 0x60;
/// Clears bits of InterruptStatus.
pub const INTERRUPT_ACK: u64 = 0x64;
/// Device status.
pub const STATUS: u64 = 0x70;
const QUEUE_DESC_LOW: u64 = 0x80;
const QUEUE_DESC_HIGH: u64 = 0x84;
const QUEUE_DRIVER_LOW: u64 = 0x90;
const QUEUE_DRIVER_HIGH: u64 = 0x94;
const QUEUE_DEVICE_LOW: u64 = 0xA0;
const QUEUE_DEVICE_HIGH: u64 = 0xA4;
const SHM_SEL: u64 = 0xAC;
const SHM_FIRST: u64 = 0xB0;
const SHM_LAST: u64 = 0xBC;
/// Start of configuration space.
pub const CONFIG: u64 = 0x100;

/// "virt", little-endian.
const MAGIC_VALUE: u32 = 0x7472_6976;
/// Version of the transport; 1 was the legacy interface.
const VERSION_VALUE: u32 = 2;
/// "FKLG", little-endian.
const VENDOR_VALUE: u32 = 0x474C_4B46;
/// What SHMLen and SHMBase read as where there is no shared memory region (4.2.2).
const NO_SHM: u32 = u32::MAX;

/// The driver has seen the device.
pub const ACKNOWLEDGE: u32 = 1;
/// The driver knows how to drive it.
pub const DRIVER: u32 = 2;
/// The driver is set up and running.
pub const DRIVER_OK: u32 = 4;
/// Features are agreed on.
pub const FEATURES_OK: u32 = 8;
/// The device gave up on its driver.
pub const NEEDS_RESET: u32 = 64;
/// The driver gave up on its device.
pub const FAILED: u32 = 128;

/// VIRTIO_F_EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1; a driver must accept it.
pub const VERSION_1: u64 = 1 << 32;
/// What every device offers.
pub const TRANSPORT_FEATURES: u64 = EVENT_IDX | VERSION_1;

/// Registers that belong to the device as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// Device status.
    pub status: u32,
    /// Which word DeviceFeatures shows.
    pub device_features_sel: u32,
    /// Which word DriverFeatures sets.
    pub driver_features_sel: u32,
    /// Features the driver accepted.
    pub driver_features: u64,
    /// Which queue the queue registers are of.
    pub queue_sel: u32,
}

impl Registers {
    /// Whether the driver accepted `feature`.
    pub fn has(&self, feature: u64) -> bool {
        self.driver_features & feature != 0
    }

    /// Whether queues may be set up now: features are agreed on and the driver does not run yet.
    pub fn may_set_up_queues(&self) -> bool {
        self.status & (FEATURES_OK | DRIVER_OK | NEEDS_RESET | FAILED) == FEATURES_OK
    }

    /// Reads a register that no queue or device part is needed for. Write-only and absent ones read as 0.
    pub fn read(&self, offset: u64) -> u32 {
        match offset {
            MAGIC => MAGIC_VALUE,
            VERSION => VERSION_VALUE,
            VENDOR_ID => VENDOR_VALUE,
            STATUS => self.status,
            SHM_FIRST..=SHM_LAST => NO_SHM,
            // ConfigGeneration (0xFC) is among these: configuration never changes.
            _ => 0,
        }
    }

    /// Writes a register that no queue is needed for. Errors: it is read-only, absent or not to be written now.
    pub fn write(&mut self, offset: u64, value: u32) -> Result<(), Violation> {
        match offset {
            DEVICE_FEATURES_SEL => self.device_features_sel = value,
            DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            QUEUE_SEL => self.queue_sel = value,
            SHM_SEL => {}
            DRIVER_FEATURES if self.status == ACKNOWLEDGE | DRIVER => {
                // Words beyond the second hold nothing that was offered; only zero can be accepted from there.
                match self.driver_features_sel {
                    0 => self.driver_features = self.driver_features & !0xFFFF_FFFF | u64::from(value),
                    1 => self.driver_features = self.driver_features & 0xFFFF_FFFF | u64::from(value) << 32,
                    _ if value == 0 => {}
                    _ => return Err(Violation::Register(offset)),
                }
            }
            _ => return Err(Violation::Register(offset)),
        }
        Ok(())
    }

    /// Takes a non-zero status write. FEATURES_OK stays clear if the features cannot be agreed on, as 3.1.1 wants.
    pub fn advance(&mut self, to: u32, offered: u64) -> Result<(), Violation> {
        let from = self.status;
        let set = to & !from;
        let keeps_all = from & !to & !NEEDS_RESET == 0;
        let step = match set & !FAILED {
            0 => true,
            ACKNOWLEDGE => from & !NEEDS_RESET == 0,
            DRIVER => from & !NEEDS_RESET == ACKNOWLEDGE,
            FEATURES_OK => from & !NEEDS_RESET == ACKNOWLEDGE | DRIVER,
            DRIVER_OK => from & !NEEDS_RESET == ACKNOWLEDGE | DRIVER | FEATURES_OK,
            _ => false,
        };
        if !keeps_all || !step {
            return Err(Violation::Status { from, to });
        }
        self.status = from | to;
        let agreed = self.driver_features & !offered == 0 && self.has(VERSION_1);
        if set & FEATURES_OK != 0 && !agreed {
            self.status &= !FEATURES_OK;
        }
        Ok(())
    }
}

/// Word `select` of a feature set.
pub fn word(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// Reads a slot without a device: a transport with device id 0, which drivers leave alone (4.2.3.1.1).
pub fn read_empty(offset: u64, data: &mut [u8]) {
    data.fill(0);
    if data.len() == 4 && matches!(offset, MAGIC | VERSION | VENDOR_ID) {
        data.copy_from_slice(&Registers::default().read(offset).to_le_bytes());
    }
}

/// Whether a write to `offset` concerns the selected queue.
pub fn is_queue_register(offset: u64) -> bool {
    matches!(
        offset,
        QUEUE_NUM
            | QUEUE_READY
            | QUEUE_DESC_LOW
            | QUEUE_DESC_HIGH
            | QUEUE_DRIVER_LOW
            | QUEUE_DRIVER_HIGH
            | QUEUE_DEVICE_LOW
            | QUEUE_DEVICE_HIGH
    )
}

/// Writes a queue register. Errors: a size that is no power of two or too large, a misaligned address, or, when the
/// queue becomes ready, a part of it outside RAM.
pub(super) fn write_queue(queue: &mut Queue, offset: u64, value: u32, ram: &GuestRam) -> Result<(), ()> {
    let low = |old: u64| GuestAddress(old & !0xFFFF_FFFF | u64::from(value));
    let high = |old: u64| GuestAddress(old & 0xFFFF_FFFF | u64::from(value) << 32);
    let written = match offset {
        QUEUE_NUM => queue.try_set_size(u16::try_from(value).map_err(|_| ())?),
        QUEUE_DESC_LOW => queue.try_set_desc_table_address(low(queue.desc_table())),
        QUEUE_DESC_HIGH => queue.try_set_desc_table_address(high(queue.desc_table())),
        QUEUE_DRIVER_LOW => queue.try_set_avail_ring_address(low(queue.avail_ring())),
        QUEUE_DRIVER_HIGH => queue.try_set_avail_ring_address(high(queue.avail_ring())),
        QUEUE_DEVICE_LOW => queue.try_set_used_ring_address(low(queue.used_ring())),
        QUEUE_DEVICE_HIGH => queue.try_set_used_ring_address(high(queue.used_ring())),
        _ => {
            queue.set_ready(value & 1 != 0);
            if queue.ready() && !is_in_ram(queue, ram) {
                queue.set_ready(false);
                return Err(());
            }
            Ok(())
        }
    };
    written.map_err(|_| ())
}

/// Whether a ready queue lies in RAM as a whole. Address 0 is what a ring has that was never set.
pub fn is_in_ram(queue: &Queue, ram: &GuestRam) -> bool {
    queue.avail_ring() != 0 && queue.is_valid(ram)
}
