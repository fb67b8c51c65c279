//! Saving a paused machine.

use std::{io, os::fd::OwnedFd};

use serde::{Deserialize, Serialize};

use super::{Error, Forkpoint, Machine, Paused};
use crate::{
    clock,
    devices::DeviceStates,
    host,
    protocol::{CpuTemplate, Payload},
    snapshot::{self, Compression, HostTags, Manifest, SnapshotWriter},
    vcpu::{VcpuState, cpuid},
    vm::VmState,
};

/// Everything of a machine but its memory, as `state.json` holds it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// Where the guest stands.
    pub forkpoint: Forkpoint,
    /// Interrupt controllers and clock.
    pub vm: VmState,
    /// One per vCPU, in order.
    pub vcpus: Vec<VcpuState>,
    /// Guest-visible state of the devices.
    pub devices: DeviceStates,
}

impl Machine<Paused> {
    /// Saves all but the memory. The event loop stands still too, so that no device changes meanwhile.
    ///
    /// `msr_list` is [`crate::vcpu::msr_list`] of this host.
    pub fn save(&self, forkpoint: &Forkpoint, msr_list: &[u32]) -> Result<MachineState, Error> {
        // vCPUs before the VM: reading a local APIC may still pull an interrupt from the I/O APIC.
        let vcpus = self.state.vcpus.iter().map(|vcpu| vcpu.save(msr_list)).collect::<Result<_, _>>()?;
        let vm = self.core.vm.save()?;
        let devices = self.core.devices.save();
        Ok(MachineState { forkpoint: forkpoint.clone(), vm, vcpus, devices })
    }
}

/// What a snapshot's manifest says beyond what the machine itself knows.
#[derive(Clone, Copy, Debug)]
pub struct About {
    /// Which CPU features the guest may see.
    pub cpu: CpuTemplate,
    /// What runs in the guest.
    pub payload: Payload,
    /// zstd level of the chunks, 1 to 19.
    pub compression: i32,
}

impl Machine<Paused> {
    /// Writes a complete snapshot into `directory`, which is empty or holds only the root image.
    ///
    /// `progress` gets chunks done and chunks in all.
    pub fn write_snapshot(
        &self,
        directory: OwnedFd,
        about: About,
        forkpoint: &Forkpoint,
        msr_list: &[u32],
        progress: impl FnMut(u64, u64),
    ) -> Result<(), Error> {
        let state = self.save(forkpoint, msr_list)?;
        let writer = SnapshotWriter::from_fd(directory)?;
        let root = if state.devices.pmem.is_some() { Some(writer.adopt_root()?) } else { None };
        let memory = self.memory();
        let read = |offset, buffer: &mut [u8]| memory.read_image(offset, buffer).map_err(io::Error::other);
        let compression = Compression { level: about.compression, threads: 0 };
        let image = writer.write_image(memory.bytes(), compression, read, progress)?;
        let manifest = Manifest {
            format: snapshot::FORMAT,
            tool: concat!("forkling ", env!("CARGO_PKG_VERSION")).into(),
            created: clock::wall_ns() / 1_000_000_000,
            host: host_tags(&state.vcpus[0]),
            memory_bytes: memory.bytes(),
            vcpus: state.vcpus.len() as u8,
            cpu: about.cpu,
            payload: about.payload,
            forkpoint: forkpoint.summary(),
            state: writer.write_state(&state)?,
            root,
            image,
        };
        Ok(writer.finish(&manifest)?)
    }
}

fn host_tags(vcpu: &VcpuState) -> HostTags {
    let vendor = cpuid::vendor(vcpu.cpuid());
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    HostTags { arch: std::env::consts::ARCH.into(), cpu_vendor: vendor, kernel, kvm: host::kvm_flavour() }
}
