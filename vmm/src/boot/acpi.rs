//! ACPI tables: how the kernel finds processors, interrupts and devices. Hardware-reduced ACPI (ACPI 6.5, 4.1): no
//! fixed hardware, no firmware; sleep and reset are one I/O port each.

use acpi_tables::{
    Aml,
    aml::{Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, ResourceTemplate, Scope},
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::{
    devices::reset::{RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT},
    memory::{
        GuestRam,
        layout::{self, Slot},
    },
};

/// Start of the tables: the area firmware uses, so that a kernel told no address finds them by searching.
pub const START: u64 = 0xE_0000;

/// End of the area for tables.
pub const END: u64 = 0x10_0000;

/// Guest-physical address of the root pointer.
pub const RSDP: u64 = START;

/// SLP_TYP of S5 (soft off), bits 2 to 4 of the sleep control register; the only sleep state there is.
const SLEEP_TYPE_S5: u8 = 5;

const OEM: [u8; 6] = *b"FORKLG";
const OEM_TABLE: [u8; 8] = *b"FORKLING";
const REVISION: u32 = 1;

/// Writes all tables. `slots` are the virtio-mmio devices the guest shall find.
pub fn write(ram: &GuestRam, vcpus: u8, slots: &[Slot]) -> Result<(), GuestMemoryError> {
    let mut next = RSDP + Rsdp::len() as u64;
    let mut place = |table: &dyn Aml| -> Result<u64, GuestMemoryError> {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let address = next.next_multiple_of(16);
        next = address + bytes.len() as u64;
        assert!(next <= END, "ACPI tables of at most 8 vCPUs and 4 devices fit 128 KiB");
        ram.write_slice(&bytes, GuestAddress(address))?;
        Ok(address)
    };
    let dsdt = place(&dsdt(slots))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    xsdt.add_entry(place(&fadt(dsdt))?);
    xsdt.add_entry(place(&madt(vcpus))?);
    let xsdt = place(&xsdt)?;
    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    ram.write_slice(&root, GuestAddress(RSDP))
}

fn io_register(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port))
}

/// Fixed description: what a PC has and this machine has not.
fn fadt(dsdt: u64) -> impl Aml {
    // IA-PC boot flags (ACPI 6.5, table 5.11). Legacy devices and the 8042 are absent by bits left clear.
    const VGA_ABSENT: u16 = 1 << 2;
    const CMOS_RTC_ABSENT: u16 = 1 << 5;
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = (VGA_ABSENT | CMOS_RTC_ABSENT).into();
    fadt.reset_reg = io_register(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = io_register(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = io_register(SLEEP_STATUS_PORT);
    fadt.finalize()
}

/// Interrupt controllers: a local APIC for each processor, with the ids KVM gives, and KVM's I/O APIC.
fn madt(vcpus: u8) -> impl Aml {
    let mut madt =
        MADT::new(OEM, OEM_TABLE, REVISION, LocalInterruptController::Address(layout::LAPIC_BASE as u32));
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC_BASE as u32, 0));
    madt
}

/// Devices, and that S5 exists.
fn dsdt(slots: &[Slot]) -> impl Aml {
    let mut body = Vec::new();
    Name::new("_S5_".into(), &Package::new(vec![&SLEEP_TYPE_S5])).to_aml_bytes(&mut body);
    serial(&mut body);
    for slot in slots {
        virtio_mmio(*slot, &mut body);
    }
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, REVISION);
    table.append_slice(&body);
    table
}

/// COM1; the kernel's 8250 driver takes its interrupt from here, since hardware-reduced ACPI has no ISA interrupts.
fn serial(body: &mut Vec<u8>) {
    Scope::new(
        "\\_SB_".into(),
        vec![&Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &0_u8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 8, 8),
                        &Interrupt::new(true, true, false, false, layout::SERIAL_GSI),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(body);
}

/// A virtio-mmio device as the kernel's virtio_mmio driver matches it: the id LNRO0005, its registers, its interrupt
/// (edge, active high: KVM's irqfd pulses the line).
fn virtio_mmio(slot: Slot, body: &mut Vec<u8>) {
    let name = format!("VIO{}", slot as u8);
    let base = u32::try_from(slot.mmio_base()).expect("the hole is below 4 GiB");
    Scope::new(
        "\\_SB_".into(),
        vec![&Device::new(
            name.as_str().into(),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &(slot as u8)),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, base, layout::VIRTIO_MMIO_SIZE as u32),
                        &Interrupt::new(true, true, false, false, slot.gsi()),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(body);
}

#[cfg(test)]
mod tests;
