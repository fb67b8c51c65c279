//! What a snapshot keeps of the serial console.

use serde::{Deserialize, Serialize};
use vm_superio::SerialState as UartState;

use crate::devices::Error;

/// Bytes the receive FIFO holds in vm-superio's model.
const FIFO: usize = 64;

/// The UART's registers, named as in the 16550A data sheet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialState {
    /// Divisor latch, low byte.
    pub baud_divisor_low: u8,
    /// Divisor latch, high byte.
    pub baud_divisor_high: u8,
    /// Interrupt enable register, 4 bits.
    pub interrupt_enable: u8,
    /// Interrupt identification register: none (1), or transmitter empty (2) and data available (4).
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register: transmitter empty and idle always, data ready if the FIFO is not empty.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Received bytes the guest has not read, at most 64.
    pub in_buffer: Vec<u8>,
}

impl From<UartState> for SerialState {
    fn from(uart: UartState) -> Self {
        let UartState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = uart;
        Self {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        }
    }
}

impl SerialState {
    /// The UART's own form of the state, if such a UART can exist.
    pub(super) fn validate(&self) -> Result<UartState, Error> {
        let check = |ok: bool, field| if ok { Ok(()) } else { Err(Error::Field { device: "serial", field }) };
        check(self.in_buffer.len() <= FIFO, "in_buffer")?;
        check(self.interrupt_enable & !0x0F == 0, "interrupt_enable")?;
        check(matches!(self.interrupt_identification, 1 | 2 | 4 | 6), "interrupt_identification")?;
        let line_status = 0x60 | u8::from(!self.in_buffer.is_empty());
        check(self.line_status == line_status, "line_status")?;
        let default = UartState::default();
        check(self.modem_status == default.modem_status, "modem_status")?;
        let Self {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            ref in_buffer,
        } = *self;
        Ok(UartState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: in_buffer.clone(),
        })
    }
}
