//! From an address to a device: the ports and registers a vCPU can exit with.
//!
//! KVM itself has the interrupt controllers. What no device answers reads as all ones and swallows writes, as on a PC
//! bus without a listener.

use super::serial::PORTS;
use super::virtio::mmio::registers;
use super::{Devices, cmos, lock, reset};
use crate::memory::layout::{SERIAL_PORT, Slot, VIRTIO_MMIO_SIZE};

/// What a guest's access means for the machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Effect {
    /// Nothing; the vCPU goes on.
    None,
    /// The guest asked for a reset or turned itself off.
    Reset,
}

/// Answer of an absent device.
const NOBODY: u8 = 0xFF;

const SERIAL_LAST: u16 = SERIAL_PORT + PORTS - 1;

impl Devices {
    /// A guest's `in` from `port`. KVM hands over a repeated `in` as one access; each byte is a read of its own.
    pub fn pio_read(&self, port: u16, data: &mut [u8]) {
        match port {
            SERIAL_PORT..=SERIAL_LAST => {
                let mut serial = lock(&self.serial);
                data.fill_with(|| serial.read((port - SERIAL_PORT) as u8));
            }
            cmos::INDEX_PORT | cmos::DATA_PORT => {
                let cmos = lock(&self.cmos);
                data.fill_with(|| cmos.read(port));
            }
            // No key pressed, no command under way.
            reset::KEYBOARD_PORT | reset::KEYBOARD_DATA_PORT => data.fill(0),
            reset::RESET_PORT | reset::SLEEP_CONTROL_PORT | reset::SLEEP_STATUS_PORT => data.fill(0),
            _ => data.fill(NOBODY),
        }
    }

    /// A guest's `out` to `port`.
    pub fn pio_write(&self, port: u16, data: &[u8]) -> Effect {
        match port {
            SERIAL_PORT..=SERIAL_LAST => {
                let mut serial = lock(&self.serial);
                data.iter().for_each(|&byte| serial.write((port - SERIAL_PORT) as u8, byte));
            }
            cmos::INDEX_PORT | cmos::DATA_PORT => {
                let mut cmos = lock(&self.cmos);
                data.iter().for_each(|&byte| cmos.write(port, byte));
            }
            _ if data.iter().any(|&byte| reset::is_reset(port, byte)) => return Effect::Reset,
            // Among the rest is 0x80, the POST code port, which kernels write to pass time.
            _ => {}
        }
        Effect::None
    }

    /// A guest's read at guest-physical address `gpa` outside RAM.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        match locate(gpa) {
            Some((Slot::Vsock, offset)) => self.vsock.read(offset, data),
            Some((Slot::Rng, offset)) => self.rng.read(offset, data),
            Some((Slot::Pmem, offset)) => match &self.pmem {
                Some(pmem) => pmem.read(offset, data),
                None => registers::read_empty(offset, data),
            },
            Some((Slot::Net, offset)) => match &self.net {
                Some(net) => net.read(offset, data),
                None => registers::read_empty(offset, data),
            },
            None => data.fill(NOBODY),
        }
    }

    /// A guest's write at guest-physical address `gpa` outside RAM.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) {
        match locate(gpa) {
            Some((Slot::Vsock, offset)) => self.vsock.write(offset, data),
            Some((Slot::Rng, offset)) => self.rng.write(offset, data),
            Some((Slot::Pmem, offset)) => {
                if let Some(pmem) = &self.pmem {
                    pmem.write(offset, data);
                }
            }
            Some((Slot::Net, offset)) => {
                if let Some(net) = &self.net {
                    net.write(offset, data);
                }
            }
            None => {}
        }
    }
}

/// The slot and the offset in it that `gpa` is in.
fn locate(gpa: u64) -> Option<(Slot, u64)> {
    let within = |slot: Slot| gpa.checked_sub(slot.mmio_base()).filter(|&offset| offset < VIRTIO_MMIO_SIZE);
    Slot::ALL.into_iter().find_map(|slot| Some((slot, within(slot)?)))
}
