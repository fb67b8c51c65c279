//! The builder process: boots a template, waits for its forkpoint, writes its snapshot.

use std::{
    convert::Infallible,
    fs::File,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex,
        mpsc::{self, RecvTimeoutError, Sender},
    },
    time::Duration,
};

use kvm_ioctls::Kvm;

use crate::{
    channel::{self, Channel},
    devices::Devices,
    machine::{
        self, About, BootFiles, ConsoleReader, EventLoopSeed, Halt, Interrupter, Machine, Observer, Source,
    },
    protocol::{BuildSpec, Failure, FailureKind, FromBuilder, StopReason, ToBuilder},
    vcpu, zygote,
};

/// Bytes of console text that explain a guest that did not get ready.
const CONSOLE_TAIL: usize = 2048;

/// Why a build ends without a snapshot.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Machine(#[from] machine::Error),
    #[error(transparent)]
    Channel(#[from] channel::Error),
    #[error("build came without its descriptors; both sides must be of one build")]
    BadMessage,
    #[error("the guest ended before it was ready ({0})")]
    Guest(String),
}

/// Serves one build on `control`. Returns whether the snapshot was written.
pub fn serve(control: Channel) -> bool {
    // A daemon that is killed takes its builders with it.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    let control = Arc::new(control);
    let answer = match build(&control) {
        Ok(()) => FromBuilder::Done,
        Err(error) => FromBuilder::Failed(failure(&error)),
    };
    // If the daemon does not hear it, it sees the process end.
    let _ = control.send(&answer, &[]);
    matches!(answer, FromBuilder::Done)
}

fn failure(error: &Error) -> Failure {
    let message = machine::one_line(error);
    match error {
        Error::Machine(error) => error.failure(),
        Error::Channel(_) | Error::BadMessage => Failure { kind: FailureKind::Host, message },
        Error::Guest(_) => Failure { kind: FailureKind::Guest, message },
    }
}

fn build(control: &Arc<Channel>) -> Result<(), Error> {
    let Some((ToBuilder::Build(spec), fds)) = control.receive()? else { return Err(Error::BadMessage) };
    let mut fds = fds.into_iter();
    let (Some(kernel), Some(initramfs), Some(directory)) = (fds.next(), fds.next(), fds.next()) else {
        return Err(Error::BadMessage);
    };
    let files = BootFiles { kernel: File::from(kernel), initramfs: File::from(initramfs) };
    control.send(&FromBuilder::Stage("boot".into()), &[])?;
    let root = if spec.root { fds.next() } else { None };
    let frames = if spec.network { fds.next() } else { None };
    if (spec.root, spec.network) != (root.is_some(), frames.is_some()) {
        return Err(Error::BadMessage);
    }
    boot_and_save(control, &spec, &files, root, frames, directory)
}

fn boot_and_save(
    control: &Arc<Channel>,
    spec: &BuildSpec,
    files: &BootFiles,
    root: Option<OwnedFd>,
    frames: Option<OwnedFd>,
    directory: OwnedFd,
) -> Result<(), Error> {
    let kvm = Kvm::new().map_err(machine::Error::NoKvm)?;
    let msr_list = vcpu::msr_list(&kvm)
        .map_err(|source| machine::Error::Kvm { call: "KVM_GET_MSR_INDEX_LIST", source })?;
    let root = root.map(zygote::map_root).transpose()?;
    let seed = EventLoopSeed::new()?;
    let machine = Machine::build(&kvm, spec, files, root.as_ref(), frames, &seed)?;
    machine.devices().plug();
    let tail = Arc::new(Mutex::new(Vec::new()));
    let source = Console { channel: control.clone(), reader: ConsoleReader::default(), tail: tail.clone() };
    let event_loop = seed.serve(machine.devices().clone(), Box::new(source)).start()?;
    let deadline = give_up_after(Duration::from_millis(spec.timeout_ms), control.clone(), tail.clone());

    let mut running = machine.resume(0, Arc::new(NotYet))?;
    let forkpoint = match running.wait(&Interrupter::of_this_thread())? {
        Halt::Forkpoint(forkpoint) => forkpoint,
        Halt::Interrupted => unreachable!("nobody else has the interrupter"),
        Halt::Ended(reason) => return Err(Error::Guest(describe(&reason, &tail))),
    };
    drop(deadline);
    control.send(&FromBuilder::Stage("freeze".into()), &[])?;
    let machine = running.pause()?;
    // Kept stopped until the process ends: the machine does not run again.
    let _stopped = event_loop.stop();
    control.send(&FromBuilder::Stage("save".into()), &[])?;
    let about = About { cpu: spec.cpu, payload: spec.payload, compression: spec.compression };
    let progress = |done, total| {
        // Progress that cannot be sent now is overtaken by later progress.
        let _ = control.try_send(&FromBuilder::Saving { done, total });
    };
    Ok(machine.write_snapshot(directory, about, &forkpoint, &msr_list, progress)?)
}

/// Ends the process with a reason unless the returned value is dropped in time.
fn give_up_after(limit: Duration, control: Arc<Channel>, tail: Arc<Mutex<Vec<u8>>>) -> Sender<Infallible> {
    let (deadline, dropped) = mpsc::channel::<Infallible>();
    std::thread::spawn(move || {
        if dropped.recv_timeout(limit) != Err(RecvTimeoutError::Timeout) {
            return;
        }
        let text = console_text(&tail);
        let message = format!(
            "no forkpoint within {} ms; raise the ready timeout or look at the guest's console: {text}",
            limit.as_millis()
        );
        let _ = control.send(&FromBuilder::Failed(Failure { kind: FailureKind::Guest, message }), &[]);
        std::process::exit(1);
    });
    deadline
}

fn describe(reason: &StopReason, tail: &Mutex<Vec<u8>>) -> String {
    let what = match reason {
        StopReason::AgentFailed(message) => return message.clone(),
        StopReason::Reset => "it powered off or reset".to_owned(),
        StopReason::TripleFault => "triple fault".to_owned(),
        StopReason::KvmError(message) => message.clone(),
    };
    format!("{what}; console: {}", console_text(tail))
}

fn console_text(tail: &Mutex<Vec<u8>>) -> String {
    String::from_utf8_lossy(&tail.lock().expect("no holder panics")).trim().to_owned()
}

/// A template acknowledges nothing: it has no identity.
struct NotYet;

impl Observer for NotYet {
    fn acknowledged(&self, _: u64, _: u64) {}
}

/// Passes console text to the daemon and keeps its end.
struct Console {
    channel: Arc<Channel>,
    reader: ConsoleReader,
    tail: Arc<Mutex<Vec<u8>>>,
}

impl Source for Console {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    fn ready(&mut self, _: &Devices) {}

    fn after_round(&mut self, devices: &Devices) {
        while let Some(text) = self.reader.read(devices) {
            let mut tail = self.tail.lock().expect("no holder panics");
            tail.extend_from_slice(&text);
            let surplus = tail.len().saturating_sub(CONSOLE_TAIL);
            tail.drain(..surplus);
            drop(tail);
            let _ = self.channel.try_send(&FromBuilder::Console(text));
        }
    }
}
