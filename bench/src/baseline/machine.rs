//! The null guest on bare KVM: saved once, and brought back in the order that zeroboot publishes.

use std::{
    fs::File,
    io::{Seek as _, Write as _},
    os::fd::{AsFd, BorrowedFd},
    time::Instant,
};

use anyhow::{Context as _, bail, ensure};
use forkling_fixtures::null_guest;
use forkling_vmm::{
    boot,
    memory::guest::GuestMemory,
    sys::{
        kvm::{XsaveArea, add_memory},
        mapping::Mapping,
    },
};
use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_pit_config, kvm_regs, kvm_sregs, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes as _, GuestAddress};

use crate::bench::MEMORY_MIB;

const BYTES: u64 = MEMORY_MIB << 20;

/// Bytes read at a time when memory is saved; no piece crosses the hole below 4 GiB.
const PIECE: usize = 64 << 10;

/// What the memory of a saved guest lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// A memfd.
    Memfd,
    /// A file of the temporary directory.
    File,
}

/// A saved null guest.
pub struct Template {
    memory: File,
    cpuid: CpuId,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    xsave: XsaveArea,
    regs: kvm_regs,
    lapic: kvm_lapic_state,
    msrs: Msrs,
    mp_state: kvm_mp_state,
    ioapic: kvm_irqchip,
    /// Kept, because the first VM of a host pays for all.
    _companion: (VmFd, VcpuFd),
}

/// Runs to the guest's next `out`.
fn run_to_out(vcpu: &mut VcpuFd) -> anyhow::Result<()> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(..)) => return Ok(()),
            Ok(VcpuExit::Intr) => {}
            Ok(other) => bail!("the null guest stopped with {other:?}"),
            Err(error) if matches!(error.errno(), 4 | 11) => {}
            Err(error) => return Err(error).context("KVM_RUN"),
        }
    }
}

/// Lets KVM finish the `out`, so that the registers are those after it.
fn complete_out(vcpu: &mut VcpuFd) -> anyhow::Result<()> {
    vcpu.set_kvm_immediate_exit(1);
    let ended = vcpu.run().map(drop);
    vcpu.set_kvm_immediate_exit(0);
    match ended {
        Err(error) if error.errno() != 4 => Err(error).context("KVM_RUN to complete an exit"),
        _ => Ok(()),
    }
}

fn supported_cpuid(kvm: &Kvm) -> anyhow::Result<CpuId> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID")
}

/// A VM that stands before the null guest's first instruction.
fn fresh(kvm: &Kvm, memory: &GuestMemory) -> anyhow::Result<(VmFd, VcpuFd)> {
    let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
    add_memory(&vm, 0, 0, memory.mapping(), 0, BYTES, false).context("KVM_SET_USER_MEMORY_REGION")?;
    vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
    let vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
    vcpu.set_cpuid2(&supported_cpuid(kvm)?).context("KVM_SET_CPUID2")?;
    boot::null::load(null_guest::PROGRAM, memory.ram())?;
    let mut sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    boot::null::enter_user_mode(&mut sregs);
    vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
    vcpu.set_regs(&boot::null::registers()).context("KVM_SET_REGS")?;
    Ok((vm, vcpu))
}

/// Boots the null guest; milliseconds to before KVM_RUN and to its first `out`.
pub fn boot_and_run() -> anyhow::Result<(f64, f64)> {
    let began = Instant::now();
    let kvm = Kvm::new().context("/dev/kvm")?;
    let memory = GuestMemory::fresh(BYTES)?;
    let (_vm, mut vcpu) = fresh(&kvm, &memory)?;
    let prepared = began.elapsed();
    run_to_out(&mut vcpu)?;
    Ok((prepared.as_secs_f64() * 1e3, began.elapsed().as_secs_f64() * 1e3))
}

impl Template {
    /// Boots the null guest to its forkpoint and saves it.
    pub fn new(kind: Memory) -> anyhow::Result<Self> {
        let kvm = Kvm::new().context("/dev/kvm")?;
        let memory = GuestMemory::fresh(BYTES)?;
        let (vm, mut vcpu) = fresh(&kvm, &memory)?;
        run_to_out(&mut vcpu)?;
        complete_out(&mut vcpu)?;
        let mut ioapic = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        vm.get_irqchip(&mut ioapic).context("KVM_GET_IRQCHIP")?;
        let xsave_size = usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(Self {
            memory: save(&memory, kind)?,
            cpuid: supported_cpuid(&kvm)?,
            sregs: vcpu.get_sregs().context("KVM_GET_SREGS")?,
            xcrs: vcpu.get_xcrs().context("KVM_GET_XCRS")?,
            xsave: XsaveArea::get(&vcpu, xsave_size).context("KVM_GET_XSAVE2")?,
            regs: vcpu.get_regs().context("KVM_GET_REGS")?,
            lapic: vcpu.get_lapic().context("KVM_GET_LAPIC")?,
            msrs: settable_msrs(&kvm, &vcpu)?,
            mp_state: vcpu.get_mp_state().context("KVM_GET_MP_STATE")?,
            ioapic,
            _companion: (vm, vcpu),
        })
    }

    /// A VM over a private mapping; milliseconds to before KVM_RUN and to the guest's first `out`.
    pub fn map_and_run(&self) -> anyhow::Result<(f64, f64)> {
        self.make_and_run(|memory| Ok(Mapping::copy_on_write(memory, BYTES as usize)?))
    }

    /// The same over a copy of all memory.
    pub fn copy_and_run(&self) -> anyhow::Result<(f64, f64)> {
        self.make_and_run(|_| {
            let copy = GuestMemory::fresh(BYTES)?;
            let mut source = self.memory.try_clone()?;
            source.rewind()?;
            copy.ram()
                .read_exact_volatile_from(GuestAddress(0), &mut source, BYTES as usize)
                .context("cannot copy the memory")?;
            Ok(*copy.mapping())
        })
    }

    fn make_and_run(
        &self,
        map: impl FnOnce(BorrowedFd<'_>) -> anyhow::Result<Mapping>,
    ) -> anyhow::Result<(f64, f64)> {
        let began = Instant::now();
        let kvm = Kvm::new().context("/dev/kvm")?;
        let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
        vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
        vm.create_pit2(kvm_pit_config::default()).context("KVM_CREATE_PIT2")?;
        let mut ioapic = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        vm.get_irqchip(&mut ioapic).context("KVM_GET_IRQCHIP")?;
        ioapic.chip = self.ioapic.chip;
        vm.set_irqchip(&ioapic).context("KVM_SET_IRQCHIP")?;
        let memory = map(self.memory.as_fd())?;
        add_memory(&vm, 0, 0, &memory, 0, BYTES, false).context("KVM_SET_USER_MEMORY_REGION")?;
        let mut vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
        vcpu.set_cpuid2(&self.cpuid).context("KVM_SET_CPUID2")?;
        vcpu.set_sregs(&self.sregs).context("KVM_SET_SREGS")?;
        vcpu.set_xcrs(&self.xcrs).context("KVM_SET_XCRS")?;
        self.xsave.set(&vcpu).context("KVM_SET_XSAVE")?;
        vcpu.set_regs(&self.regs).context("KVM_SET_REGS")?;
        vcpu.set_lapic(&self.lapic).context("KVM_SET_LAPIC")?;
        let written = vcpu.set_msrs(&self.msrs).context("KVM_SET_MSRS")?;
        ensure!(written == self.msrs.as_slice().len(), "KVM took {written} MSRs only");
        vcpu.set_mp_state(self.mp_state).context("KVM_SET_MP_STATE")?;
        let prepared = began.elapsed();
        run_to_out(&mut vcpu)?;
        Ok((prepared.as_secs_f64() * 1e3, began.elapsed().as_secs_f64() * 1e3))
    }
}

/// The MSRs that KVM of this host both gives and takes, with their values.
fn settable_msrs(kvm: &Kvm, vcpu: &VcpuFd) -> anyhow::Result<Msrs> {
    let mut settable = Vec::new();
    for &index in kvm.get_msr_index_list().context("KVM_GET_MSR_INDEX_LIST")?.as_slice() {
        let mut one = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }])?;
        let taken = |count: Result<usize, _>| count == Ok(1);
        if taken(vcpu.get_msrs(&mut one)) && taken(vcpu.set_msrs(&one)) {
            settable.push(one.as_slice()[0]);
        }
    }
    Ok(Msrs::from_entries(&settable)?)
}

/// Writes the memory, zeros left out, into a file with no name.
fn save(memory: &GuestMemory, kind: Memory) -> anyhow::Result<File> {
    let file: File = match kind {
        Memory::Memfd => rustix::fs::memfd_create("baseline", rustix::fs::MemfdFlags::CLOEXEC)?.into(),
        Memory::File => tempfile::tempfile()?,
    };
    file.set_len(BYTES)?;
    let mut buffer = vec![0; PIECE];
    let mut writer = &file;
    for offset in (0..BYTES).step_by(PIECE) {
        memory.read_image(offset, &mut buffer)?;
        if buffer.iter().any(|&byte| byte != 0) {
            writer.seek(std::io::SeekFrom::Start(offset))?;
            writer.write_all(&buffer)?;
        }
    }
    Ok(file)
}
