//! The ways a guest asks for its end: reset by the keyboard controller or the chipset, power-off by the ACPI sleep
//! register. None of them has state.

/// Command and status port of the keyboard controller (i8042).
pub const KEYBOARD_PORT: u16 = 0x64;

/// Data port of the keyboard controller.
pub const KEYBOARD_DATA_PORT: u16 = 0x60;

/// Reset control register of PC chipsets; the FADT's reset register.
pub const RESET_PORT: u16 = 0xCF9;

/// Value for the FADT's reset register: reset the CPU, hard.
pub const RESET_VALUE: u8 = 0x06;

/// ACPI sleep control register (hardware-reduced ACPI), named in the FADT.
pub const SLEEP_CONTROL_PORT: u16 = 0xF08;

/// ACPI sleep status register; reads as 0.
pub const SLEEP_STATUS_PORT: u16 = 0xF09;

/// Bit SLP_EN of [`SLEEP_CONTROL_PORT`] (ACPI 6.5, 4.8.3.7). The only sleep state offered is S5, power-off.
const SLEEP_ENABLE: u8 = 1 << 5;

/// i8042 command "pulse output line 0", wired to the CPU's reset pin.
const PULSE_RESET: u8 = 0xFE;

/// Bit 2 of [`RESET_PORT`]: a write with it set resets.
const RESET_CPU: u8 = 1 << 2;

/// Whether this write resets the machine or turns it off.
pub fn is_reset(port: u16, value: u8) -> bool {
    match port {
        KEYBOARD_PORT => value == PULSE_RESET,
        RESET_PORT => value & RESET_CPU != 0,
        SLEEP_CONTROL_PORT => value & SLEEP_ENABLE != 0,
        _ => false,
    }
}
