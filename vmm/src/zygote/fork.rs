//! The process of one fork, from its first instruction to its end.

use std::{
    convert::Infallible,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        mpsc::{self, Receiver},
    },
};

use super::{
    Zygote,
    control::{Acknowledge, Control, SaveRequest},
};
use crate::{
    channel::Channel,
    clock,
    machine::{self, About, EventLoopSeed, Forkpoint, Halt, Machine, Paused, RunningLoop, Steps},
    protocol::{FromFork, Stamps, StopReason, ToFork},
    sys::uffd::Uffd,
};

/// zstd level of the chunks of a snapshot that a fork writes.
const COMPRESSION: i32 = 3;

/// Why a fork's process ends.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Machine(#[from] machine::Error),
    #[error(transparent)]
    Channel(#[from] crate::channel::Error),
    #[error("cannot set up the process")]
    Process(#[source] std::io::Error),
    #[error("userfaultfd is not available; load the template eagerly")]
    Uffd(#[from] crate::sys::uffd::Error),
    #[error("the guest ended")]
    Ended(StopReason),
    #[error("the daemon is gone")]
    DaemonGone,
}

/// Runs the fork in the new process and ends it.
pub fn run(
    zygote: &Zygote,
    zygote_control: &mut Channel,
    control: Channel,
    lazy: bool,
    mut stamps: Stamps,
) -> ! {
    stamps.forked = clock::monotonic_ns();
    let control = Arc::new(control);
    let Err(error) = live(zygote, zygote_control, &control, lazy, stamps);
    let farewell = match error {
        Error::DaemonGone => std::process::exit(1),
        Error::Ended(reason) => FromFork::Stopped(reason),
        Error::Machine(error) => FromFork::Failed(error.failure()),
        other => FromFork::Failed(crate::protocol::Failure {
            kind: crate::protocol::FailureKind::Host,
            message: machine::one_line(&other),
        }),
    };
    // If the daemon does not hear it, it sees the process end.
    let _ = control.send(&farewell, &[]);
    std::process::exit(0)
}

fn live(
    zygote: &Zygote,
    zygote_control: &mut Channel,
    control: &Arc<Channel>,
    lazy: bool,
    mut stamps: Stamps,
) -> Result<Infallible, Error> {
    become_child_of_daemon(zygote, zygote_control)?;
    // Held until the process ends: closing it would end the registration.
    let _faults = if lazy { Some(announce_faults(zygote, control)?) } else { None };
    let steps = Steps {
        vm: &mut || stamps.vm = clock::monotonic_ns(),
        vcpus: &mut || stamps.vcpus = clock::monotonic_ns(),
    };
    let seed = EventLoopSeed::new()?;
    let Zygote { kvm, machine: prepared, memory, root, .. } = zygote;
    let machine = Machine::restore(kvm, prepared, memory.clone(), root.as_ref(), &seed, steps)?;
    let (send_saves, saves) = mpsc::channel();
    let source = Box::new(Control::new(control.clone(), send_saves));
    let event_loop = seed.serve(machine.devices().clone(), source).start()?;
    stamps.restored = clock::monotonic_ns();
    control.send(&FromFork::Parked(stamps), &[])?;

    let Some((ToFork::Activate { mailbox, advance_monotonic }, _)) = control.receive()? else {
        return Err(Error::DaemonGone);
    };
    stamps.activated = clock::monotonic_ns();
    let forkpoint = zygote.machine.forkpoint();
    forkpoint.write_mailbox(machine.memory().ram(), &mailbox)?;
    zygote.machine.restart_clocks(&machine, advance_monotonic)?;
    event_loop.watch_source()?;
    machine.devices().kick();
    stamps.entered = clock::monotonic_ns();
    rounds(zygote, control, machine, event_loop, forkpoint.clone(), &saves, stamps)
}

/// Runs the guest; at each further forkpoint it waits to be saved, and goes on.
fn rounds(
    zygote: &Zygote,
    control: &Arc<Channel>,
    mut machine: Machine<Paused>,
    mut event_loop: RunningLoop,
    mut forkpoint: Forkpoint,
    saves: &Receiver<SaveRequest>,
    stamps: Stamps,
) -> Result<Infallible, Error> {
    loop {
        let observer = Arc::new(Acknowledge::new(control.clone(), stamps));
        let mut running = machine.resume(forkpoint.vcpu, observer)?;
        forkpoint = match running.wait()? {
            Halt::Forkpoint(forkpoint) => forkpoint,
            Halt::Ended(reason) => return Err(Error::Ended(reason)),
        };
        let Ok(request) = saves.recv() else { return Err(Error::DaemonGone) };
        let still = event_loop.stop();
        machine = running.pause()?;
        let answer = match save(zygote, &machine, &forkpoint, request.directory) {
            Ok(()) => FromFork::Saved,
            Err(error) => FromFork::Failed(error.failure()),
        };
        event_loop = still.start()?;
        forkpoint.write_mailbox(machine.memory().ram(), &request.mailbox)?;
        control.send(&answer, &[])?;
    }
}

fn save(
    zygote: &Zygote,
    machine: &Machine<Paused>,
    forkpoint: &Forkpoint,
    directory: OwnedFd,
) -> Result<(), machine::Error> {
    let manifest = zygote.snapshot.manifest();
    let about = About { cpu: manifest.cpu, payload: manifest.payload, compression: COMPRESSION };
    machine.write_snapshot(directory, about, forkpoint, &zygote.msr_list, |_, _| {})
}

/// Dies with the daemon and lets go of what belongs to the zygote.
fn become_child_of_daemon(zygote: &Zygote, zygote_control: &mut Channel) -> Result<(), Error> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(|error| Error::Process(error.into()))?;
    if rustix::process::getppid() != zygote.daemon {
        return Err(Error::DaemonGone);
    }
    // The daemon takes the end of this socket for the zygote's end, so it must not live on here.
    zygote_control.detach().map_err(Error::Process)
}

fn announce_faults(zygote: &Zygote, control: &Channel) -> Result<Uffd, Error> {
    let mapping = zygote.memory.mapping();
    let uffd = Uffd::for_missing(mapping)?;
    control
        .send(&FromFork::Faults { base: mapping.address(), len: mapping.len() as u64 }, &[uffd.as_fd()])?;
    Ok(uffd)
}
