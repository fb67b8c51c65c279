//! The few fields of a saved local APIC that a restore looks at (Intel SDM volume 3, section 12.4).

use kvm_bindings::kvm_lapic_state;

/// Timer entry of the local vector table: vector in bits 0-7, mask in bit 16, mode in bits 17-18.
const TIMER: usize = 0x320;
const MASKED: u32 = 1 << 16;
const MODE: u32 = 3 << 17;
const MODE_TSC_DEADLINE: u32 = 2 << 17;
/// First of eight 32-bit interrupt request registers, 16 bytes apart.
const REQUESTS: usize = 0x200;

/// The timer's vector if it is in deadline mode and not masked.
pub fn deadline_timer_vector(lapic: &kvm_lapic_state) -> Option<u8> {
    let entry = read(lapic, TIMER);
    (entry & MODE == MODE_TSC_DEADLINE && entry & MASKED == 0).then_some(entry as u8)
}

/// Whether `vector` is requested and not yet delivered; it no longer is.
pub fn take_pending(lapic: &mut kvm_lapic_state, vector: u8) -> bool {
    let offset = REQUESTS + usize::from(vector / 32) * 16;
    let bit = 1 << (vector % 32);
    let requests = read(lapic, offset);
    write(lapic, offset, requests & !bit);
    requests & bit != 0
}

/// Sets the timer up as a guest does it that uses deadlines.
#[cfg(test)]
pub fn set_deadline_timer(lapic: &mut kvm_lapic_state, vector: u8) {
    write(lapic, TIMER, MODE_TSC_DEADLINE | u32::from(vector));
}

fn read(lapic: &kvm_lapic_state, offset: usize) -> u32 {
    let bytes = std::array::from_fn(|n| lapic.regs[offset + n] as u8);
    u32::from_le_bytes(bytes)
}

fn write(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (register, byte) in lapic.regs[offset..].iter_mut().zip(value.to_le_bytes()) {
        *register = byte as _;
    }
}

#[cfg(test)]
mod tests;
