//! Building a machine that boots a template.

use std::{fs::File, io::Read, os::fd::OwnedFd, sync::Arc};

use kvm_ioctls::Kvm;

use super::{Core, Error, EventLoopSeed, Machine, Paused, restore::connect};
use crate::{
    boot::{self, long_mode},
    devices::{DeviceConfig, Devices},
    memory::{
        guest::GuestMemory,
        layout::{MIB, Slot},
    },
    protocol::{BuildSpec, Payload},
    sys::mapping::Mapping,
    vcpu::{Vcpu, cpuid},
    vm::Vm,
};

/// The files a template boots from.
pub struct BootFiles {
    /// Kernel, or the null guest's program.
    pub kernel: File,
    /// Initramfs; not used by the null guest.
    pub initramfs: File,
}

impl Machine<Paused> {
    /// Builds a machine whose vCPU 0 stands at the entry of the kernel or of the null guest.
    pub fn build(
        kvm: &Kvm,
        spec: &BuildSpec,
        files: &BootFiles,
        root: Option<&Mapping>,
        frames: Option<OwnedFd>,
        event_loop: &EventLoopSeed,
    ) -> Result<Self, Error> {
        let bytes = u64::from(spec.memory_mib) * MIB;
        let memory = GuestMemory::fresh(bytes).map_err(|source| Error::Map { bytes, source })?;
        let vm = Vm::new(kvm, &memory, root)?;
        let mut vcpus = Vec::with_capacity(usize::from(spec.vcpus));
        let supported = super::supported_cpuid(kvm)?;
        for id in 0..spec.vcpus {
            let cpuid = cpuid::guest(&supported, spec.cpu, id, spec.vcpus);
            vcpus.push(Vcpu::new(&vm, id, cpuid)?);
        }
        let config = DeviceConfig { pmem: root.is_some(), net: frames.is_some() };
        let backends = event_loop.backends(root.map(|root| root.len() as u64), frames)?;
        let devices = Devices::new(&config, backends, memory.ram().clone())?;
        connect(&vm, &devices)?;
        match spec.payload {
            Payload::Linux => boot_linux(&vcpus[0], spec, files, &slots(&config), &memory)?,
            Payload::Null => boot_null(&vcpus[0], &files.kernel, &memory)?,
        }
        Ok(Self { core: Core { vm, memory, devices: Arc::new(devices) }, state: Paused { vcpus } })
    }
}

/// The slots in which the guest shall look for devices.
fn slots(config: &DeviceConfig) -> Vec<Slot> {
    let present = |slot: &Slot| match slot {
        Slot::Vsock | Slot::Rng => true,
        Slot::Pmem => config.pmem,
        Slot::Net => config.net,
    };
    Slot::ALL.into_iter().filter(present).collect()
}

fn boot_linux(
    vcpu: &Vcpu,
    spec: &BuildSpec,
    files: &BootFiles,
    slots: &[Slot],
    memory: &GuestMemory,
) -> Result<(), Error> {
    let BootFiles { kernel, initramfs } = files;
    let entry =
        boot::load(kernel, initramfs, &spec.cmdline, spec.vcpus, slots, memory.ram(), memory.bytes())?;
    vcpu.set_entry(&entry.regs(), long_mode::apply)?;
    vcpu.set_boot_values(&long_mode::fpu(), &long_mode::msrs())?;
    Ok(())
}

fn boot_null(vcpu: &Vcpu, program: &File, memory: &GuestMemory) -> Result<(), Error> {
    let mut bytes = Vec::new();
    program.take(boot::null::MAX_PROGRAM as u64 + 1).read_to_end(&mut bytes).map_err(Error::ReadProgram)?;
    if bytes.is_empty() || bytes.len() > boot::null::MAX_PROGRAM {
        return Err(Error::BadProgram(bytes.len()));
    }
    boot::null::load(&bytes, memory.ram()).map_err(Error::Memory)?;
    vcpu.set_entry(&boot::null::registers(), boot::null::enter_user_mode)?;
    Ok(())
}
