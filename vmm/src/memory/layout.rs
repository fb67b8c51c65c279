//! The guest-physical address map, the same for every template.
//!
//! ```text
//! 0            RAM, up to LOW_RAM_END
//! 3 GiB        hole: virtio-mmio registers, IOAPIC, LAPIC, KVM's private pages
//! 4 GiB        the rest of RAM
//! 128 GiB      root image (virtio-pmem)
//! ```

/// Page size of the guest and of the image in bytes.
pub const PAGE: u64 = 4096;

/// One MiB in bytes.
pub const MIB: u64 = 1 << 20;

/// Smallest guest memory in MiB.
pub const MIN_MEMORY_MIB: u32 = 64;

/// Largest guest memory in MiB.
pub const MAX_MEMORY_MIB: u32 = 64 * 1024;

/// Most vCPUs.
pub const MAX_VCPUS: u8 = 8;

/// End of the RAM below the hole.
pub const LOW_RAM_END: u64 = 0xC000_0000;

/// Start of the RAM above the hole.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// Registers of the first virtio-mmio device.
pub const VIRTIO_MMIO_BASE: u64 = 0xD000_0000;

/// Distance between the registers of two virtio-mmio devices.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;

/// I/O APIC registers, where KVM's in-kernel model has them.
pub const IOAPIC_BASE: u64 = 0xFEC0_0000;

/// Local APIC registers.
pub const LAPIC_BASE: u64 = 0xFEE0_0000;

/// Three pages KVM wants on Intel hosts without unrestricted guests (KVM_SET_TSS_ADDR), clear of all else.
pub const KVM_TSS: u64 = 0xFFFB_D000;

/// Start of the root image, above any RAM.
pub const PMEM_BASE: u64 = 128 << 30;

/// The root image's guest-physical range is a multiple of this (the guest maps it in 2 MiB sections).
pub const PMEM_ALIGN: u64 = 2 * MIB;

/// I/O port of the serial console (COM1).
pub const SERIAL_PORT: u16 = 0x3F8;

/// Interrupt (GSI) of the serial console.
pub const SERIAL_GSI: u32 = 4;

/// GSI of the virtio-mmio device in slot 0; slot n has this plus n.
pub const VIRTIO_GSI_BASE: u32 = 5;

/// The virtio-mmio slots. A slot without its device reads as device id 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Slot {
    /// virtio-vsock.
    Vsock = 0,
    /// virtio-pmem.
    Pmem = 1,
    /// virtio-rng.
    Rng = 2,
    /// virtio-net.
    Net = 3,
}

impl Slot {
    /// All slots in order.
    pub const ALL: [Slot; 4] = [Slot::Vsock, Slot::Pmem, Slot::Rng, Slot::Net];

    /// Guest-physical address of the slot's registers.
    pub fn mmio_base(self) -> u64 {
        VIRTIO_MMIO_BASE + u64::from(self as u8) * VIRTIO_MMIO_SIZE
    }

    /// Interrupt of the slot.
    pub fn gsi(self) -> u32 {
        VIRTIO_GSI_BASE + u32::from(self as u8)
    }
}

/// One contiguous piece of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// Guest-physical start.
    pub gpa: u64,
    /// Offset in the image and in the host mapping.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// The pieces of `memory_bytes` of RAM, around the hole; one or two.
pub fn ram_regions(memory_bytes: u64) -> Vec<RamRegion> {
    let low = memory_bytes.min(LOW_RAM_END);
    let mut regions = vec![RamRegion { gpa: 0, offset: 0, len: low }];
    if memory_bytes > low {
        regions.push(RamRegion { gpa: HIGH_RAM_START, offset: low, len: memory_bytes - low });
    }
    regions
}

const _: () = assert!(LOW_RAM_END <= VIRTIO_MMIO_BASE);
const _: () = assert!(HIGH_RAM_START + (MAX_MEMORY_MIB as u64) * MIB <= PMEM_BASE);
const _: () = assert!(PMEM_BASE.is_multiple_of(PMEM_ALIGN));
