//! The real-time clock (MC146818) and its index register, as far as kernels look at it.
//!
//! Reads give the host's wall clock. There is no alarm and no interrupt; writes to the data port are dropped.
//! "Update in progress" is never set: a driver that sees it polls, Linux for up to eight seconds.

use std::time::{SystemTime, UNIX_EPOCH};

use super::Error;

pub mod state;
#[cfg(test)]
mod tests;

pub use state::CmosState;

/// Port of the index register.
pub const INDEX_PORT: u16 = 0x70;

/// Port of the indexed data.
pub const DATA_PORT: u16 = 0x71;

/// Bit 7 of the index port masks NMIs on PCs and is not part of the index.
const INDEX_MASK: u8 = 0x7F;

/// Register A: no update in progress, 32.768 kHz time base, 1024 Hz rate.
const REGISTER_A: u8 = 0x26;

/// Register B: 24-hour mode, BCD, no interrupts.
const REGISTER_B: u8 = 0x02;

/// Register D: RAM and time are valid.
const REGISTER_D: u8 = 0x80;

/// The clock chip.
#[derive(Debug, Default)]
pub struct Cmos {
    index: u8,
}

impl Cmos {
    /// Continues from a saved state. Errors: an index the port cannot hold.
    pub fn restore(state: &CmosState) -> Result<Self, Error> {
        let CmosState { index } = *state;
        if index > INDEX_MASK {
            return Err(Error::Field { device: "cmos", field: "index" });
        }
        Ok(Self { index })
    }

    /// The guest-visible state.
    pub fn save(&self) -> CmosState {
        let Self { index } = *self;
        CmosState { index }
    }

    /// A guest's read of one byte from `port`.
    pub fn read(&self, port: u16) -> u8 {
        // The index register of a PC cannot be read back.
        if port != DATA_PORT {
            return 0xFF;
        }
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        register(self.index, since_epoch)
    }

    /// A guest's write of one byte to `port`.
    pub fn write(&mut self, port: u16, value: u8) {
        if port == INDEX_PORT {
            self.index = value & INDEX_MASK;
        }
    }
}

/// Value of register `index` at `seconds` after the Unix epoch.
fn register(index: u8, seconds: u64) -> u8 {
    let days = seconds / 86_400;
    let (year, month, day) = civil(days);
    match index {
        0x00 => bcd(seconds % 60),
        0x02 => bcd(seconds / 60 % 60),
        0x04 => bcd(seconds / 3600 % 24),
        // Sunday is 1; the epoch was a Thursday.
        0x06 => bcd((days + 4) % 7 + 1),
        0x07 => bcd(day),
        0x08 => bcd(month),
        0x09 => bcd(year % 100),
        0x32 => bcd(year / 100),
        0x0A => REGISTER_A,
        0x0B => REGISTER_B,
        0x0D => REGISTER_D,
        _ => 0,
    }
}

/// Gregorian (year, month 1-12, day 1-31) of a day counted from 1970-01-01.
fn civil(days: u64) -> (u64, u64, u64) {
    // Years are counted from March so that the leap day is a year's last; day 0 becomes 0000-03-01.
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

/// Two decimal digits, one per nibble.
fn bcd(value: u64) -> u8 {
    (((value / 10 % 10) << 4) | (value % 10)) as u8
}
