//! What a VM holds outside of its vCPUs: interrupt controllers and the clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use serde::{Deserialize, Serialize};

use super::{Error, Vm, kvm};
use crate::{clock, snapshot::blob};

/// Saved interrupt controllers and clock.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    /// First 8259, `kvm_irqchip` as bytes.
    #[serde(with = "blob")]
    pic_master: kvm_irqchip,
    /// Second 8259.
    #[serde(with = "blob")]
    pic_slave: kvm_irqchip,
    /// I/O APIC.
    #[serde(with = "blob")]
    ioapic: kvm_irqchip,
    /// The guest's monotonic clock.
    pub clock: ClockState,
}

/// The paravirtual clock at the freeze.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockState {
    /// Nanoseconds since the guest's boot.
    pub guest_ns: u64,
    /// The host's wall clock at the freeze in nanoseconds since 1970.
    pub wall_ns: u64,
}

impl Vm {
    /// Saves interrupt controllers and clock. All vCPUs are stopped and saved before: saving a vCPU may still move
    /// an interrupt.
    pub fn save(&self) -> Result<VmState, Error> {
        Ok(VmState {
            pic_master: self.get_irqchip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: self.get_irqchip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: self.get_irqchip(KVM_IRQCHIP_IOAPIC)?,
            clock: self.clock()?,
        })
    }

    /// The guest's clock now.
    pub fn clock(&self) -> Result<ClockState, Error> {
        let kvm_clock = self.fd.get_clock().map_err(kvm("KVM_GET_CLOCK"))?;
        Ok(ClockState { guest_ns: kvm_clock.clock, wall_ns: clock::wall_ns() })
    }

    /// Restores the interrupt controllers. The vCPUs exist; no device is connected yet, whose interrupt would be
    /// overwritten.
    pub fn restore_irqchips(&self, state: &VmState) -> Result<(), Error> {
        for chip in [&state.pic_master, &state.pic_slave, &state.ioapic] {
            self.fd.set_irqchip(chip).map_err(kvm("KVM_SET_IRQCHIP"))?;
        }
        Ok(())
    }

    /// Sets the guest's clock to where it was at the freeze, plus the wall-clock time passed since if `advance`.
    ///
    /// Called at activation, not before: a parked fork may wait for minutes. No flag is given, since
    /// KVM_CLOCK_REALTIME would make the guest's monotonic time jump (Firecracker pull request 5809).
    pub fn set_clock(&self, state: &ClockState, advance: bool) -> Result<(), Error> {
        let passed = if advance { clock::wall_ns().saturating_sub(state.wall_ns) } else { 0 };
        let clock = kvm_clock_data { clock: state.guest_ns.saturating_add(passed), ..Default::default() };
        self.fd.set_clock(&clock).map_err(kvm("KVM_SET_CLOCK"))
    }

    fn get_irqchip(&self, chip_id: u32) -> Result<kvm_irqchip, Error> {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        self.fd.get_irqchip(&mut chip).map_err(kvm("KVM_GET_IRQCHIP"))?;
        Ok(chip)
    }
}
