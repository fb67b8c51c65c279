//! The zygote process: holds one template's image and decoded state, and makes forks of it.
//!
//! It has one thread, so that a fork of it is a plain copy. All that a fork can inherit is prepared here once: the
//! open KVM device, the mapped image and root, the validated state in KVM's own structures.

mod control;
mod desk;
mod embryo;
mod fork;
mod touched;

use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use kvm_ioctls::{Kvm, VmFd};

use crate::{
    channel::{self, Channel},
    clock,
    machine::{self, Offer, PreparedMachine},
    memory::guest::GuestMemory,
    protocol::{Failure, FailureKind, FirstPages, FromZygote, Stamps, ToZygote, View},
    snapshot::Manifest,
    sys::{
        mapping::Mapping,
        process::{self, Forked, SingleThreaded},
    },
    vcpu,
};

/// What a fork inherits from its zygote.
pub struct Zygote {
    kvm: Kvm,
    machine: PreparedMachine,
    memory: GuestMemory,
    /// What `memory` is a view of, for rewinds.
    image: File,
    root: Option<Mapping>,
    first_pages: FirstPages,
    /// See [`ToZygote::Load`].
    trim_after: Option<Duration>,
    /// What is still to be done for forks, the last one first.
    chores: Vec<Chore>,
    /// The embryo that is asked for and not made yet: its token and control socket. It comes after all chores, whose work it inherits.
    expected: Option<(u64, Channel)>,
    /// Whether a fork was just made, so that chores have to wait.
    spawned: bool,
    manifest: Manifest,
    msr_list: Vec<u32>,
    daemon: Option<rustix::process::Pid>,
    single: SingleThreaded,
    _open_vm: VmFd,
}

/// What is the same for every template, and had before one is given.
struct Host {
    kvm: Kvm,
    offer: Offer,
    msr_list: Vec<u32>,
    /// The first VM of a host turns virtualisation on and the last one turns it off, 10 ms on AMD; this one, which
    /// never gets memory, spares the forks that.
    open_vm: VmFd,
}

/// What a zygote does for its forks while none is asked for; a millisecond each.
enum Chore {
    /// Keep the part of the image that starts here in a large page.
    Enlarge(u64),
    /// Map what forks read, for them to inherit.
    MapAhead,
}

/// How long chores wait after a fork was made: it has the CPU to itself until its first command has ended.
const REST: Duration = Duration::from_millis(50);

/// What joins a fork with the rest of the world.
struct Wires {
    control: Channel,
    /// Of its NIC, if it has one.
    frames: Option<OwnedFd>,
}

/// What a fork is to be: see [`ToZygote::Spawn`].
#[derive(Clone, Copy, Debug)]
struct Wanted {
    view: View,
    pre_fault: bool,
    /// Whether it waits for [`crate::protocol::ToFork::Begin`], with which its NIC's wire comes.
    embryo: bool,
}

/// Why a zygote ends.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The control socket failed.
    #[error(transparent)]
    Channel(#[from] channel::Error),
    /// A message came without its descriptors, or out of order.
    #[error("{0} came without what it needs; both sides must be of one build")]
    BadMessage(&'static str),
    /// The process cannot be set up.
    #[error("cannot set up the process")]
    Process(#[source] std::io::Error),
}

/// Serves `control` until the daemon is gone.
///
/// # Errors
/// [`Error`] when the daemon breaks the protocol. A snapshot that cannot be forked is reported as
/// [`FromZygote::LoadFailed`].
pub fn serve(mut control: Channel) -> Result<(), Error> {
    let single = SingleThreaded::check().map_err(Error::Process)?;
    // Before anything else: a daemon that is killed now takes this process with it.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(|error| Error::Process(error.into()))?;
    // A huge page under a heap of a fork takes it 2 MiB and, to be cleared, longer than all else together.
    process::allow_large_pages(false);
    process::use_one_heap();
    let host = Host::prepare();
    // The daemon may keep it for long before it has a template for it.
    process::set_name(process::SPARE);
    let (manifest, root, trim_after_ms, fds) = match control.receive()? {
        Some((ToZygote::Load { manifest, root, trim_after_ms }, fds)) => (manifest, root, trim_after_ms, fds),
        Some(_) => return Err(Error::BadMessage("the first message")),
        None => return Ok(()),
    };
    process::set_name(process::NAME);
    let mut zygote = match host.and_then(|host| Zygote::load(&manifest, fds, root, host, single)) {
        Ok(zygote) => zygote,
        Err(failure) => return Ok(control.send(&FromZygote::LoadFailed(failure), &[])?),
    };
    // A vCPU other than the lead may be at a forkpoint, or end, while the machine is paused for a trim, and that would be lost.
    let one_vcpu = zygote.manifest.vcpus == 1;
    zygote.trim_after = trim_after_ms.filter(|_| one_vcpu).map(|ms| Duration::from_millis(ms.into()));
    // Kernels that heed it for mapped files, too, would not map the image by large pages. What a fork allocates is smaller.
    process::allow_large_pages(true);
    control.send(&FromZygote::Loaded, &[])?;
    while let Some((message, fds)) = zygote.next(&mut control)? {
        let mut fds = fds.into_iter();
        match (message, fds.next(), fds.next()) {
            (ToZygote::Spawn { token, view, pre_fault }, Some(ours), frames)
                if frames.is_some() == zygote.machine.has_nic() =>
            {
                let wires = Wires { control: Channel::new(ours), frames };
                zygote.spawn(&mut control, token, Wanted { view, pre_fault, embryo: false }, wires)?;
            }
            (ToZygote::Embryo { token }, Some(ours), None) if zygote.expected.is_none() => {
                zygote.expected = Some((token, Channel::new(ours)));
            }
            (ToZygote::FirstPages(set), None, None) => zygote.take_first_pages(set),
            (ToZygote::Spawn { .. }, ..) => return Err(Error::BadMessage("a spawn")),
            (ToZygote::Embryo { .. }, ..) => return Err(Error::BadMessage("an embryo")),
            (ToZygote::Load { .. } | ToZygote::FirstPages(_), ..) => {
                return Err(Error::BadMessage("a second load, or pages"));
            }
        }
    }
    Ok(())
}

impl Host {
    fn prepare() -> Result<Self, Failure> {
        let refused = |call| move |source| machine::Error::Kvm { call, source }.failure();
        let kvm = Kvm::new().map_err(|error| machine::Error::NoKvm(error).failure())?;
        let offer = Offer::of(&kvm).map_err(|error| error.failure())?;
        let msr_list = vcpu::msr_list(&kvm).map_err(refused("KVM_GET_MSR_INDEX_LIST"))?;
        let open_vm = kvm.create_vm().map_err(refused("KVM_CREATE_VM"))?;
        Ok(Self { kvm, offer, msr_list, open_vm })
    }
}

impl Zygote {
    /// Decodes and validates a snapshot and maps its image. `manifest` and `fds` are those of [`ToZygote::Load`].
    fn load(
        manifest: &[u8],
        fds: Vec<OwnedFd>,
        root: bool,
        host: Host,
        single: SingleThreaded,
    ) -> Result<Self, Failure> {
        let mut fds = fds.into_iter();
        let (Some(state), Some(image)) = (fds.next(), fds.next()) else {
            return Err(request("load came without its descriptors; both sides must be of one build"));
        };
        let Host { kvm, offer, msr_list, open_vm } = host;
        let fail = |error: &machine::Error| error.failure();
        let manifest = Manifest::decode(manifest).map_err(|error| fail(&error.into()))?;
        let bytes = manifest.memory_bytes;
        let memory = GuestMemory::copy_on_write(&image, bytes)
            .map_err(|source| fail(&machine::Error::Map { bytes, source }))?;
        let root = match (root, fds.next()) {
            (false, _) => None,
            (true, None) => return Err(request("load came without its root image")),
            (true, Some(root)) => Some(map_root(root).map_err(|error| fail(&error))?),
        };
        let state = manifest.read_state(&File::from(state)).map_err(|error| fail(&error.into()))?;
        let machine = PreparedMachine::new(state, &offer, &memory).map_err(|error| fail(&error))?;
        let daemon = rustix::process::getppid();
        let image = File::from(image);
        Ok(Self {
            _open_vm: open_vm,
            kvm,
            machine,
            memory,
            image,
            root,
            first_pages: FirstPages::default(),
            trim_after: None,
            chores: Vec::new(),
            expected: None,
            spawned: false,
            manifest,
            msr_list,
            daemon,
            single,
        })
    }

    /// The next message; `None` when the daemon is gone. While there is none, chores are done one by one, and then the embryo is made.
    fn next(&mut self, control: &mut Channel) -> Result<Option<(ToZygote, Vec<OwnedFd>)>, Error> {
        while !self.chores.is_empty() || self.expected.is_some() {
            let patience = if std::mem::take(&mut self.spawned) { REST } else { Duration::ZERO };
            if control.wait(patience)? {
                break;
            }
            match self.chores.pop() {
                Some(Chore::Enlarge(part)) => self.memory.enlarge(part),
                Some(Chore::MapAhead) => {
                    self.memory.map_ahead(&self.first_pages.read, &self.first_pages.acknowledge);
                }
                None => {
                    if let Some((token, ours)) = self.expected.take() {
                        let wires = Wires { control: ours, frames: None };
                        let wanted = Wanted { view: View::Complete, pre_fault: false, embryo: true };
                        self.spawn(control, token, wanted, wires)?;
                    }
                }
            }
        }
        Ok(control.receive()?)
    }

    /// Prepares for forks that touch these pages first. Those they read are named when the image is complete, and not before: a
    /// large page has no holes.
    fn take_first_pages(&mut self, set: FirstPages) {
        let large = self.memory.worth_enlarging(&set.read, &[&set.acknowledge, &set.command]);
        tracing::debug!(parts = large.len(), "what forks only read goes into large pages");
        let when_complete = Some(Chore::MapAhead).filter(|_| !set.read.is_empty());
        self.chores = when_complete.into_iter().chain(large.into_iter().map(Chore::Enlarge)).collect();
        self.first_pages = set;
    }

    /// Makes the process of one fork.
    fn spawn(
        &mut self,
        control: &mut Channel,
        token: u64,
        wanted: Wanted,
        wires: Wires,
    ) -> Result<(), Error> {
        let stamps = Stamps { requested: clock::monotonic_ns(), ..Stamps::default() };
        let answer = match process::fork_as_sibling(&self.single) {
            Ok(Forked::Child) => fork::run(self, control, wires, wanted, stamps),
            Ok(Forked::Parent(pid)) => FromZygote::Spawned { token, pid },
            Err(error) => {
                let message = format!("cannot make a process for the fork; raise the process limit: {error}");
                FromZygote::SpawnFailed { token, failure: Failure { kind: FailureKind::Host, message } }
            }
        };
        self.spawned = true;
        Ok(control.send(&answer, &[])?)
    }
}

/// Maps a root image read-only; its length must suit the guest's memory sections.
pub(crate) fn map_root(root: impl AsFd + Into<OwnedFd>) -> Result<Mapping, machine::Error> {
    let file = File::from(root.into());
    let len = file.metadata().map(|metadata| metadata.len()).unwrap_or(0);
    if len == 0 || !len.is_multiple_of(crate::memory::layout::PMEM_ALIGN) {
        return Err(machine::Error::BadState("a root image whose length is not a multiple of 2 MiB"));
    }
    Mapping::read_only(&file, len as usize).map_err(|source| machine::Error::Map { bytes: len, source })
}

fn request(message: &str) -> Failure {
    Failure { kind: FailureKind::Request, message: message.into() }
}
