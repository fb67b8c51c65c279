//! virtio-rng (virtio 1.2, 5.4): random bytes from the host's kernel.

use rustix::rand::{GetRandomFlags, getrandom};

use super::{Queues, Violation, VirtioDevice, copy_config};
use crate::devices::Error;

pub mod state;
#[cfg(test)]
mod tests;

pub use state::RngState;

const REQUESTS: usize = 0;

/// Most bytes one request gets. The guest names the size, so it needs a limit.
pub const MAX_REQUEST: usize = 64 * 1024;

/// Bytes fetched from the host's kernel at a time; up to 256 the call is never cut short by a signal.
const PIECE: usize = 256;

/// The entropy device. It has no state of its own: what it gave, the driver has.
#[derive(Debug, Default)]
pub struct Rng;

impl Rng {
    /// Continues from a saved state.
    pub fn restore(state: &RngState) -> Self {
        let RngState {} = state;
        Self
    }
}

impl VirtioDevice for Rng {
    type State = RngState;

    const ID: u32 = 4;
    const QUEUE_SIZES: &'static [u16] = &[16];

    // A guest's kernel asks by itself, in its first minutes every few seconds.
    const BY_VCPU: bool = true;

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&[], offset, data);
    }

    fn write_config(&mut self, offset: u64, _data: &[u8]) -> Result<(), Violation> {
        Err(Violation::Config(offset))
    }

    fn activate(&mut self) {}

    fn reset(&mut self) {}

    fn process(&mut self, queues: &mut Queues<'_>) -> Result<(), Violation> {
        while let Some(chain) = queues.pop(REQUESTS)? {
            let wanted = chain.writable_len().min(MAX_REQUEST);
            let mut given = 0;
            while given < wanted {
                let mut piece = [0; PIECE];
                let piece = &mut piece[..PIECE.min(wanted - given)];
                // Only fails on kernels without the call; the driver copes with a short answer.
                let Ok(len) = getrandom(&mut *piece, GetRandomFlags::empty()) else { break };
                chain.write(queues.ram(), given, &piece[..len]).map_err(|_| Violation::Chain(REQUESTS))?;
                given += len;
            }
            queues.push_used(REQUESTS, &chain, given)?;
        }
        Ok(())
    }

    fn save(&self) -> RngState {
        let Self = self;
        RngState {}
    }

    fn rewind(&mut self, state: &RngState) -> Result<(), Error> {
        let RngState {} = state;
        Ok(())
    }
}
