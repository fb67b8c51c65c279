//! Building a machine that boots a template.

use std::{fs::File, io::Read, sync::Arc};

use kvm_ioctls::Kvm;

use super::{Core, Error, Machine, Paused, restore::connect};
use crate::{
    boot,
    devices::{DeviceConfig, Devices},
    memory::{guest::GuestMemory, layout::MIB},
    protocol::{BuildSpec, Payload},
    sys::mapping::Mapping,
    vcpu::{Error as VcpuError, Vcpu, cpuid},
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
    pub fn build(kvm: &Kvm, spec: &BuildSpec, files: &BootFiles, root: Option<&Mapping>) -> Result<Self, Error> {
        let bytes = u64::from(spec.memory_mib) * MIB;
        let memory = GuestMemory::fresh(bytes).map_err(|source| Error::Map { bytes, source })?;
        let vm = Vm::new(kvm, &memory, root)?;
        let mut vcpus = Vec::with_capacity(usize::from(spec.vcpus));
        for id in 0..spec.vcpus {
            let cpuid = cpuid::for_guest(kvm, spec.cpu, id, spec.vcpus)?;
            vcpus.push(Vcpu::new(&vm, id, &cpuid)?);
        }
        let config = DeviceConfig { root_len: root.map(|root| root.len() as u64) };
        let devices = Devices::new(&config, memory.ram())?;
        connect(&vm, &devices)?;
        match spec.payload {
            Payload::Linux => boot_linux(&vcpus[0], spec, files, &devices, &memory)?,
            Payload::Null => boot_null(&vcpus[0], &files.kernel, &memory)?,
        }
        Ok(Self { core: Core { vm, memory, devices: Arc::new(devices) }, state: Paused { vcpus } })
    }
}

fn boot_linux(
    vcpu: &Vcpu,
    spec: &BuildSpec,
    files: &BootFiles,
    devices: &Devices,
    memory: &GuestMemory,
) -> Result<(), Error> {
    let entry = boot::load(&files.kernel, &files.initramfs, &spec.cmdline, spec.vcpus, &devices.slots(), memory.ram(), memory.bytes())?;
    let kvm = |call| move |source| VcpuError::Kvm { call, vcpu: 0, source };
    let mut sregs = vcpu.fd().get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
    entry.enter_long_mode(&mut sregs);
    vcpu.fd().set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))?;
    vcpu.fd().set_regs(&entry.registers()).map_err(kvm("KVM_SET_REGS"))?;
    Ok(())
}

fn boot_null(vcpu: &Vcpu, program: &File, memory: &GuestMemory) -> Result<(), Error> {
    let mut bytes = Vec::new();
    program.take(boot::null::MAX_PROGRAM as u64 + 1).read_to_end(&mut bytes).map_err(boot::Error::ReadKernel)?;
    boot::null::load(&bytes, memory.ram())?;
    let kvm = |call| move |source| VcpuError::Kvm { call, vcpu: 0, source };
    let mut sregs = vcpu.fd().get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
    boot::null::enter_user_mode(&mut sregs);
    vcpu.fd().set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))?;
    vcpu.fd().set_regs(&boot::null::registers()).map_err(kvm("KVM_SET_REGS"))?;
    Ok(())
}
