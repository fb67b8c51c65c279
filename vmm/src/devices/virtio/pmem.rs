//! virtio-pmem (virtio 1.2, 5.19): tells the guest where the root image lies in its address space.
//!
//! The image itself is a read-only memory slot of the machine. Nothing can be dirty, so a flush is done at once.

use super::{Queues, Violation, VirtioDevice, copy_config};
use crate::devices::Error;
use crate::memory::layout::{PMEM_ALIGN, PMEM_BASE};

pub mod state;
#[cfg(test)]
mod tests;

pub use state::PmemState;

const REQUESTS: usize = 0;

/// The only request type (5.19.6).
const FLUSH: u32 = 0;

/// Request done.
const OK: u32 = 0;

/// Request failed.
const FAILED: u32 = 1;

/// Bytes of a request and of its answer.
const WORD: usize = 4;

/// Largest root image in bytes: guests have at least 40 physical address bits, and the image starts at [`PMEM_BASE`].
pub const MAX_SIZE: u64 = (1 << 40) - PMEM_BASE;

/// Host side: the image the machine has mapped.
#[derive(Clone, Copy, Debug)]
pub struct Backend {
    /// Length of the guest-physical range in bytes: a multiple of [`PMEM_ALIGN`], 1 to [`MAX_SIZE`].
    pub size: u64,
}

/// The root image device.
#[derive(Debug)]
pub struct Pmem {
    size: u64,
}

impl Pmem {
    /// A device for the image. Errors: its size is impossible.
    pub fn new(backend: Backend) -> Result<Self, Error> {
        let size = backend.size;
        let possible = size != 0 && size <= MAX_SIZE && size.is_multiple_of(PMEM_ALIGN);
        if possible { Ok(Self { size }) } else { Err(Error::RootSize(size)) }
    }

    /// Continues from a saved state. Errors: the image has another size than when the state was saved.
    pub fn restore(state: &PmemState, backend: Backend) -> Result<Self, Error> {
        let PmemState { size } = *state;
        let device = Self::new(backend)?;
        if device.size != size {
            return Err(Error::RootChanged { saved: size, given: device.size });
        }
        Ok(device)
    }
}

impl VirtioDevice for Pmem {
    type State = PmemState;

    const ID: u32 = 27;
    const QUEUE_SIZES: &'static [u16] = &[16];

    // Nothing has to be done for a read-only image.
    const BY_VCPU: bool = true;

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 16];
        config[..8].copy_from_slice(&PMEM_BASE.to_le_bytes());
        config[8..].copy_from_slice(&self.size.to_le_bytes());
        copy_config(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, _data: &[u8]) -> Result<(), Violation> {
        Err(Violation::Config(offset))
    }

    fn activate(&mut self) {}

    fn reset(&mut self) {}

    fn process(&mut self, queues: &mut Queues<'_>) -> Result<(), Violation> {
        while let Some(chain) = queues.pop(REQUESTS)? {
            let mut request = [0; WORD];
            chain.read(queues.ram(), 0, &mut request).map_err(|_| Violation::Short(REQUESTS))?;
            let answer = if u32::from_le_bytes(request) == FLUSH { OK } else { FAILED };
            chain.write(queues.ram(), 0, &answer.to_le_bytes()).map_err(|_| Violation::Short(REQUESTS))?;
            queues.push_used(REQUESTS, &chain, WORD)?;
        }
        Ok(())
    }

    fn save(&self) -> PmemState {
        let Self { size } = *self;
        PmemState { size }
    }

    fn rewind(&mut self, state: &PmemState) -> Result<(), Error> {
        *self = Self::restore(state, Backend { size: self.size })?;
        Ok(())
    }
}
