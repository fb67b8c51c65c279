//! What a snapshot keeps of all devices.

use serde::{Deserialize, Serialize};

use super::cmos::CmosState;
use super::serial::SerialState;
use super::virtio::mmio::MmioState;
use super::virtio::net::NetState;
use super::virtio::pmem::PmemState;
use super::virtio::rng::RngState;
use super::virtio::vsock::VsockState;

/// Guest-visible state of every device; no host resource and no identity is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceStates {
    /// Serial console.
    pub serial: SerialState,
    /// Clock chip.
    pub cmos: CmosState,
    /// virtio-vsock.
    pub vsock: MmioState<VsockState>,
    /// virtio-pmem, if the template has a root image.
    pub pmem: Option<MmioState<PmemState>>,
    /// virtio-rng.
    pub rng: MmioState<RngState>,
    /// virtio-net, if the template has a NIC.
    pub net: Option<MmioState<NetState>>,
}
