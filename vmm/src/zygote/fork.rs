//! The process of one fork, from its first instruction to its end.

use std::{
    convert::Infallible,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use super::{
    Wanted, Wires, Zygote,
    control::{Acknowledge, Request},
    desk::Desk,
    embryo,
};
use crate::{
    channel::Channel,
    clock,
    machine::{self, About, EventLoop, EventLoopSeed, Forkpoint, Halt, Machine, Paused, RunningLoop, Steps},
    memory::{folded::Folded, guest::Trimmed},
    protocol::{FromFork, Opening, Stamps, StopReason, ToFork, View},
    sys::{process, uffd::Uffd},
    vm::ClockState,
};

/// zstd level of the chunks of a snapshot that a fork writes.
const COMPRESSION: i32 = 3;

/// Most bytes of private pages that a rewind keeps: far more than a rehearsal writes, far less than a guest has.
const MOST_KEPT: u64 = 32 << 20;

/// How long a guest is left alone by its timer. What its kernel does in a tick costs as much as all else up to the
/// acknowledgement, mostly in page faults; a timer may fire late, and this once it does.
const QUIET: Duration = Duration::from_millis(10);

/// The same while memory comes from the disk: a tick then waits for some thirty pages that its first answer has no need of.
const QUIET_WHEN_COLD: Duration = Duration::from_millis(30);

/// Why a fork's process ends.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
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
    wires: Wires,
    wanted: Wanted,
    mut stamps: Stamps,
) -> ! {
    stamps.forked = clock::monotonic_ns();
    if wanted.embryo {
        process::set_name(process::EMBRYO);
    }
    let Wires { control, frames } = wires;
    let control = Arc::new(control);
    let Err(error) = live(zygote, zygote_control, &control, frames, wanted, stamps);
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
    frames: Option<OwnedFd>,
    wanted: Wanted,
    mut stamps: Stamps,
) -> Result<Infallible, Error> {
    become_child_of_daemon(zygote, zygote_control)?;
    let Wanted { view, pre_fault, embryo } = wanted;
    // Held until the process ends: closing it would end the registration.
    let _faults = match view {
        View::Complete => None,
        View::Bare => {
            zygote.memory.renew(&zygote.image).map_err(Error::Process)?;
            None
        }
        View::Lazy => Some(announce_faults(zygote, control)?),
        View::Exact => Some(Uffd::without_fault_around(zygote.memory.mapping())?),
    };
    // Before the VM exists: no second-stage entry has to be taken back for it. Where they are missing, these pages are what the
    // pager reads first, and nothing goes on without them.
    if matches!(view, View::Complete | View::Lazy) {
        zygote.memory.copy_ahead(&zygote.first_pages.acknowledge);
    }
    let seed = EventLoopSeed::new()?;
    let frames = if embryo { embryo::wait(zygote, control, &mut stamps)? } else { frames };
    let steps = Steps {
        vm: &mut || stamps.vm = clock::monotonic_ns(),
        vcpus: &mut || stamps.vcpus = clock::monotonic_ns(),
    };
    let Zygote { kvm, machine: prepared, memory, root, .. } = zygote;
    let mut machine = Machine::restore(kvm, prepared, memory.clone(), root.as_ref(), frames, &seed, steps)?;
    if pre_fault {
        machine.pre_fault(prepared, &zygote.first_pages.read);
    }
    let (desk, mut source) = Desk::open(control, &zygote.memory);
    // An embryo has copies of them.
    if !embryo && matches!(view, View::Complete | View::Bare) {
        let (memory, command) = (zygote.memory.clone(), zygote.first_pages.command.clone());
        source.before_connection(move || memory.copy_ahead(&command));
    }
    let trim_after = zygote.trim_after.filter(|_| matches!(view, View::Complete | View::Bare));
    source.trim_after(trim_after);
    let event_loop = ParkedLoop::Still(seed.serve(machine.devices().clone(), source));
    // A bare fork holds as little as can be, and is no sooner there for a thread.
    let mut event_loop = if view == View::Bare { event_loop } else { event_loop.begun()? };
    stamps.restored = clock::monotonic_ns();
    // One that tells what cold forks touch is as quiet as they are.
    let quiet = if matches!(view, View::Lazy | View::Exact) { QUIET_WHEN_COLD } else { QUIET };
    let mut fork = Fork { zygote, control, desk, quiet, learning: view == View::Exact };
    loop {
        machine.devices().kick();
        fork.control.send(&FromFork::Parked(stamps), &[])?;
        let still;
        (machine, still) = fork.serve_once(machine, event_loop, stamps)?;
        let (desk, mut source) = Desk::open(control, &zygote.memory);
        source.trim_after(trim_after);
        fork.desk = desk;
        event_loop = ParkedLoop::Still(still.with_source(source)?).begun()?;
        // What the way here took is not needed again, and the fork may wait for long.
        process::trim_heap();
    }
}

/// The event loop of a parked fork.
enum ParkedLoop {
    /// Without a thread.
    Still(EventLoop),
    /// On its thread, and without work.
    Running(RunningLoop),
}

impl ParkedLoop {
    fn running(self) -> Result<RunningLoop, machine::Error> {
        match self {
            Self::Still(event_loop) => event_loop.start(),
            Self::Running(event_loop) => Ok(event_loop),
        }
    }

    fn begun(self) -> Result<Self, machine::Error> {
        self.running().map(Self::Running)
    }
}

/// A machine that waits for its activation.
struct Parked {
    machine: Machine<Paused>,
    /// Where it waits.
    forkpoint: Forkpoint,
    /// Where its clock stood when it came there, if it has run since its restore.
    clock: Option<ClockState>,
}

/// The fork's process, as its main thread sees it.
struct Fork<'a> {
    zygote: &'a Zygote,
    control: &'a Arc<Channel>,
    desk: Desk,
    /// For how long it is without timers when it is activated.
    quiet: Duration,
    /// Whether the acknowledgement is to say what was touched until then.
    learning: bool,
}

impl Fork<'_> {
    /// From parked to parked: waits for the activation, runs the guest until a rewind is wanted, and rewinds it.
    fn serve_once(
        &mut self,
        machine: Machine<Paused>,
        mut event_loop: ParkedLoop,
        mut stamps: Stamps,
    ) -> Result<(Machine<Paused>, EventLoop), Error> {
        let Zygote { machine: prepared, image, .. } = self.zygote;
        let mut parked = Parked { machine, forkpoint: prepared.forkpoint().clone(), clock: None };
        let (mailbox, advance_monotonic, plugged) = loop {
            match self.control.receive()? {
                Some((ToFork::Activate { mailbox, advance_monotonic, plugged }, _)) => {
                    break (mailbox, advance_monotonic, plugged);
                }
                Some((ToFork::Prepare { mailbox }, _)) => {
                    event_loop = event_loop.begun()?;
                    parked = self.prepare(parked, &mailbox)?;
                    self.control.send(&FromFork::Parked(stamps), &[])?;
                }
                Some((ToFork::Connect { port, opening }, fds)) => {
                    for stream in fds {
                        connect_ahead(&parked.machine, port, opening.clone(), stream);
                    }
                }
                _ => return Err(Error::DaemonGone),
            }
        };
        stamps.activated = clock::monotonic_ns();
        let Parked { mut machine, forkpoint, clock } = parked;
        forkpoint.write_mailbox(machine.memory().ram(), &mailbox)?;
        prepared.restart_clocks(&mut machine, clock.as_ref(), self.quiet, advance_monotonic)?;
        if plugged {
            machine.devices().plug();
        }
        self.desk.active.store(true, Ordering::Relaxed);
        let event_loop = event_loop.running()?;
        event_loop.watch_source()?;
        stamps.entered = clock::monotonic_ns();
        let (mut machine, event_loop, keep_writes) = self.run(machine, event_loop, forkpoint, stamps)?;
        machine.rewind(prepared, image, if keep_writes { MOST_KEPT } else { 0 })?;
        Ok((machine, event_loop))
    }

    /// Runs the guest to its next forkpoint, where it waits for its activation again.
    fn prepare(&self, parked: Parked, mailbox: &[u8]) -> Result<Parked, Error> {
        let Parked { mut machine, forkpoint, clock } = parked;
        let prepared = &self.zygote.machine;
        forkpoint.write_mailbox(machine.memory().ram(), mailbox)?;
        prepared.restart_clocks(&mut machine, clock.as_ref(), self.quiet, false)?;
        let observer = Arc::new(Acknowledge::new(self.control.clone(), Stamps::default(), None));
        let mut running = machine.resume(forkpoint.vcpu, observer)?;
        let forkpoint = match running.wait(&self.desk.interrupter)? {
            Halt::Forkpoint(reached) => reached,
            Halt::Interrupted => unreachable!("nobody reads the control socket meanwhile"),
            Halt::Ended(reason) => return Err(Error::Ended(reason)),
        };
        let mut machine = running.pause()?;
        let clock = prepared.stop_clocks(&mut machine)?;
        Ok(Parked { machine, forkpoint, clock })
    }

    /// Runs the guest until a rewind is wanted, and tells whether that is to keep the pages it wrote; at each further
    /// forkpoint it waits for a request, and goes on.
    fn run(
        &mut self,
        mut machine: Machine<Paused>,
        mut event_loop: RunningLoop,
        mut forkpoint: Forkpoint,
        stamps: Stamps,
    ) -> Result<(Machine<Paused>, EventLoop, bool), Error> {
        loop {
            let learn = self.learning.then(|| machine.memory().clone());
            let observer = Arc::new(Acknowledge::new(self.control.clone(), stamps, learn));
            let mut running = machine.resume(forkpoint.vcpu, observer)?;
            let request = loop {
                match running.wait(&self.desk.interrupter)? {
                    Halt::Forkpoint(reached) => {
                        forkpoint = reached;
                        break self.desk.at_forkpoint().ok_or(Error::DaemonGone)?;
                    }
                    Halt::Interrupted => {
                        if let Some(urgent) = self.desk.urgent() {
                            break urgent;
                        }
                    }
                    Halt::Ended(reason) => return Err(Error::Ended(reason)),
                }
            };
            let mut still = event_loop.stop();
            machine = running.pause()?;
            let (mailbox, directory) = match request {
                Request::Rewind { keep_writes } => return Ok((machine, still, keep_writes)),
                Request::Save { mailbox, directory } => (mailbox, directory),
                // It has had something to do since, and will be at rest again.
                Request::Trim { .. } if still.catch_up() => {
                    event_loop = still.start()?;
                    continue;
                }
                Request::Trim { pages } => {
                    let Trimmed { equal, folded } = machine.trim(&pages, &self.zygote.image)?;
                    let pages = folded.as_ref().map_or(0, Folded::len);
                    tracing::debug!(equal, folded = pages, "memory is given back");
                    event_loop = still.with_folded(folded)?.start()?;
                    continue;
                }
            };
            let answer = match save(self.zygote, &machine, &forkpoint, directory) {
                Ok(()) => FromFork::Saved,
                Err(error) => FromFork::Failed(error.failure()),
            };
            event_loop = still.start()?;
            forkpoint.write_mailbox(machine.memory().ram(), &mailbox)?;
            self.control.send(&answer, &[])?;
        }
    }
}

/// Joins a stream with a guest that stands still, for which it is nothing new if it takes the line.
fn connect_ahead(machine: &Machine<Paused>, port: u32, opening: Opening, stream: OwnedFd) {
    if let Err(error) = machine.devices().connect(port, stream, opening) {
        // The stream is closed, which is what its other side waits for.
        tracing::debug!(port, %error, "vsock connection refused");
    }
}

fn save(
    zygote: &Zygote,
    machine: &Machine<Paused>,
    forkpoint: &Forkpoint,
    directory: OwnedFd,
) -> Result<(), machine::Error> {
    let manifest = &zygote.manifest;
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
