//! The serial console: a 16550A UART (vm-superio) whose output goes into a bounded ring.
//!
//! Output is host-side history, not guest state: a fork's ring starts empty.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use vm_superio::{Serial as Uart, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Error;

pub mod ring;
pub mod state;
#[cfg(test)]
mod tests;

pub use ring::Ring;
pub use state::SerialState;

/// Number of ports of the UART.
pub const PORTS: u16 = 8;

const INTERRUPT_ENABLE: u8 = 1;
const LINE_CONTROL: u8 = 3;
const ENABLE_TRANSMIT_EMPTY: u8 = 1 << 1;
const DIVISOR_LATCH: u8 = 1 << 7;

/// Host side of the console.
#[derive(Debug, Default)]
pub struct Backend {
    /// Woken when there is output to read; once, until it is read.
    pub waker: Option<Arc<mio::Waker>>,
}

/// The UART's interrupt line: an eventfd, bound to the GSI by the machine.
#[derive(Debug)]
struct Line(Arc<EventFd>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The console device.
#[derive(Debug)]
pub struct Serial {
    uart: Uart<Line, NoEvents, Ring>,
}

impl Serial {
    /// A UART after power-on. Errors: the host has no eventfd to give.
    pub fn new(backend: Backend) -> Result<Self, Error> {
        Ok(Self { uart: Uart::new(Self::line()?, Ring::new(backend.waker)) })
    }

    /// Continues from a saved state. Errors: a register holds bits the UART does not have; no eventfd.
    pub fn restore(state: &SerialState, backend: Backend) -> Result<Self, Error> {
        Self::with(state, Self::line()?, Ring::new(backend.waker))
    }

    /// Goes to a saved state in place; output that was not read is lost. Errors: as for [`Self::restore`].
    pub fn rewind(&mut self, state: &SerialState) -> Result<(), Error> {
        *self = Self::with(state, Line(self.irq()), self.uart.writer().successor())?;
        Ok(())
    }

    fn with(state: &SerialState, line: Line, ring: Ring) -> Result<Self, Error> {
        let uart = Uart::from_state(&state.validate()?, line, NoEvents, ring)
            .map_err(|_| Error::Field { device: "serial", field: "in_buffer" })?;
        Ok(Self { uart })
    }

    fn line() -> Result<Line, Error> {
        let fd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::EventFd)?;
        Ok(Line(Arc::new(fd)))
    }

    /// The guest-visible state.
    pub fn save(&self) -> SerialState {
        let Self { uart } = self;
        SerialState::from(uart.state())
    }

    /// Interrupt line, for the machine's irqfd.
    pub fn irq(&self) -> Arc<EventFd> {
        Arc::clone(&self.uart.interrupt_evt().0)
    }

    /// A guest's read of register `offset` (0 to 7).
    pub fn read(&mut self, offset: u8) -> u8 {
        self.uart.read(offset)
    }

    /// A guest's write to register `offset` (0 to 7).
    pub fn write(&mut self, offset: u8, value: u8) {
        // The ring never fails. A full eventfd counter means the interrupt is pending already.
        let _ = self.uart.write(offset, value);
    }

    /// After a restore: a driver that was waiting for "transmitter empty" when the state was saved gets it now.
    pub fn kick(&mut self) {
        let latched = self.read(LINE_CONTROL) & DIVISOR_LATCH != 0;
        if !latched {
            let enabled = self.read(INTERRUPT_ENABLE);
            if enabled & ENABLE_TRANSMIT_EMPTY != 0 {
                // Enabling an interrupt whose cause is present raises it, and the transmitter is always empty.
                self.write(INTERRUPT_ENABLE, enabled);
            }
        }
    }

    /// Output from byte number `from` on (see [`Ring::read`]).
    pub fn output(&mut self, from: u64, max: usize) -> (Range<u64>, Vec<u8>) {
        self.uart.writer_mut().read(from, max)
    }
}
