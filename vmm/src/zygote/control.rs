//! A running fork's side of its control socket.

use std::{
    ops::Range,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::Sender,
    },
    time::Duration,
};

use super::touched;
use crate::{
    channel::Channel,
    devices::{
        Devices,
        virtio::vsock::{HostPorts, Vsock},
    },
    machine::{ConsoleReader, Interrupter, Observer, Source},
    memory::guest::GuestMemory,
    protocol::{Failure, FailureKind, FromFork, Opening, Passage, Stamps, ToFork},
    sys::pagemap::total,
};

/// What the lead vCPU's thread is to do with the machine.
pub enum Request {
    /// Save it at its next forkpoint.
    Save {
        /// Mailbox with which it then goes on.
        mailbox: Vec<u8>,
        /// Empty snapshot directory.
        directory: OwnedFd,
    },
    /// Rewind it now.
    Rewind {
        /// See [`ToFork::Rewind`].
        keep_writes: bool,
    },
    /// Trim it now.
    Trim {
        /// Pages that may be equal to the image, as byte ranges.
        pages: Vec<Range<u64>>,
    },
}

/// Most bytes of private pages that are compared with the image, while the guest stands still: some milliseconds.
const MOST_COMPARED: u64 = 8 << 20;

/// Largest guest that is trimmed, in bytes. Before Linux 6.7 finding its private pages takes 20 ns for each page it has.
const LARGEST_TRIMMED: u64 = 4 << 30;

/// Serves the control socket in the event loop while the guest runs.
pub struct Control {
    channel: Arc<Channel>,
    requests: Sender<Request>,
    interrupter: Interrupter,
    memory: GuestMemory,
    console: ConsoleReader,
    /// After a rewind, the socket is the lead vCPU's.
    rewinding: bool,
    /// Done before the first connection, since a command follows it.
    before_connection: Option<Box<dyn FnOnce() + Send>>,
    /// When the fork is to be trimmed, if ever.
    trim_after: Option<Duration>,
    /// Whether it is activated: what a parked fork has copies of is for its activation.
    active: Arc<AtomicBool>,
}

impl Control {
    /// Requests go to `requests`, whose receiver is the lead vCPU's thread, which says when the fork is `active`. `memory` is the guest's,
    /// for reports of it.
    pub fn new(
        channel: Arc<Channel>,
        requests: Sender<Request>,
        interrupter: Interrupter,
        memory: GuestMemory,
        active: Arc<AtomicBool>,
    ) -> Self {
        let console = ConsoleReader::default();
        Self {
            channel,
            requests,
            interrupter,
            memory,
            console,
            rewinding: false,
            before_connection: None,
            trim_after: None,
            active,
        }
    }

    /// Has the lead vCPU's thread trim the fork when it is active and nothing has happened for so long.
    pub fn trim_after(&mut self, quiet: Option<Duration>) {
        self.trim_after = quiet.filter(|_| self.memory.bytes() <= LARGEST_TRIMMED);
    }

    /// Does `work` before it makes the first connection.
    pub fn before_connection(&mut self, work: impl FnOnce() + Send + 'static) {
        self.before_connection = Some(Box::new(work));
    }

    fn connect(&mut self, devices: &Devices, port: u32, opening: Opening, stream: OwnedFd) {
        if let Some(work) = self.before_connection.take() {
            work();
        }
        let forwarded = match opening {
            Opening::Forwarded { group, .. } => Some(group),
            Opening::Plain | Opening::Announced => None,
        };
        if let Err(error) = devices.connect(port, stream, opening) {
            // The stream is closed, which is what its other side waits for.
            tracing::debug!(port, %error, "vsock connection refused");
            if let Some(group) = forwarded {
                self.report(group, Passage::Refused);
            }
        }
    }

    fn report(&self, group: u32, passage: Passage) {
        // Whoever counts must not miss one; a daemon that is gone is noticed at the next receipt.
        let _ = self.channel.send(&FromFork::Forwarded { group, passage }, &[]);
    }

    // The receiver lives as long as the process.
    fn request(&self, request: Request) {
        let _ = self.requests.send(request);
    }
}

impl Source for Control {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    fn ready(&mut self, devices: &Devices) {
        while !self.rewinding {
            match self.channel.try_receive() {
                Ok(Some((ToFork::Connect { port, opening }, fds))) => {
                    for stream in fds {
                        self.connect(devices, port, opening.clone(), stream);
                    }
                }
                Ok(Some((ToFork::OfferPorts, _))) => {
                    let ports = Box::new(Asker { channel: self.channel.clone() });
                    devices.with_vsock(|vsock| vsock.offer_ports(ports));
                }
                Ok(Some((ToFork::Dialled { token }, mut fds))) => devices.dialled(token, fds.pop()),
                Ok(Some((ToFork::Cut { group }, _))) => devices.cut(group),
                Ok(Some((ToFork::Save { mailbox }, fds))) => {
                    for directory in fds {
                        self.request(Request::Save { mailbox: mailbox.clone(), directory });
                    }
                }
                Ok(Some((ToFork::Report, _))) => {
                    devices.look_for_buffers();
                    if let Err(error) = touched::report(&self.channel, &self.memory) {
                        tracing::warn!(
                            error = crate::machine::one_line(&error),
                            "the working set is not told"
                        );
                    }
                }
                Ok(Some((ToFork::Rewind { keep_writes }, _))) => {
                    self.request(Request::Rewind { keep_writes });
                    self.interrupter.interrupt();
                    self.rewinding = true;
                }
                Err(crate::channel::Error::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    return;
                }
                // The daemon is gone or of another build: nobody can use this fork any more.
                Ok(None | Some((ToFork::Begin | ToFork::Activate { .. } | ToFork::Prepare { .. }, _)))
                | Err(_) => std::process::exit(1),
            }
        }
    }

    fn patience(&self) -> Option<Duration> {
        self.trim_after.filter(|_| !self.rewinding && self.active.load(Ordering::Relaxed))
    }

    fn at_rest(&mut self) {
        // Before the guest is stopped: pages it copies meanwhile are no loss.
        match self.memory.private() {
            Ok(pages) if (1..=MOST_COMPARED).contains(&total(&pages)) => {
                self.request(Request::Trim { pages });
                self.interrupter.interrupt();
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "not trimmed"),
        }
    }

    fn guest_lost(&mut self, error: std::io::Error) -> ! {
        let message = format!("its memory cannot be brought back: {}", crate::machine::one_line(&error));
        let failure = Failure { kind: FailureKind::Host, message };
        // If the daemon does not hear it, it sees the process end.
        let _ = self.channel.send(&FromFork::Failed(failure), &[]);
        std::process::exit(0)
    }

    fn after_round(&mut self, devices: &Devices) {
        for (group, passage) in devices.with_vsock(Vsock::take_news) {
            self.report(group, passage);
        }
        while let Some(text) = self.console.read(devices) {
            // A daemon that does not keep up loses console text, never the fork.
            let _ = self.channel.try_send(&FromFork::Console(text));
        }
    }
}

/// Asks the daemon for host ports.
#[derive(Debug)]
struct Asker {
    channel: Arc<Channel>,
}

impl HostPorts for Asker {
    fn dial(&mut self, token: u64, port: u32) -> bool {
        // Called with the device locked: a daemon that does not keep up is not waited for.
        self.channel.try_send(&FromFork::Dial { token, port }).is_ok()
    }
}

/// Passes the acknowledgement on, straight from the vCPU's thread.
pub struct Acknowledge {
    channel: Arc<Channel>,
    stamps: std::sync::Mutex<Stamps>,
    /// The guest's memory, if it is to be told what was touched of it.
    learn: Option<GuestMemory>,
}

impl Acknowledge {
    /// `stamps` are those reached until the guest is entered. What was touched of `learn` is told first: the guest stands
    /// still meanwhile, so it is what the way to the acknowledgement takes and no page more.
    pub fn new(channel: Arc<Channel>, stamps: Stamps, learn: Option<GuestMemory>) -> Self {
        Self { channel, stamps: std::sync::Mutex::new(stamps), learn }
    }
}

impl Observer for Acknowledge {
    fn acknowledged(&self, generation: u64, nonce: u64) {
        let mut stamps = self.stamps.lock().expect("no holder panics");
        stamps.acknowledged = crate::clock::monotonic_ns();
        if let Some(Err(error)) = self.learn.as_ref().map(|memory| touched::report(&self.channel, memory)) {
            // Whoever learns from this fork sees that it is missing.
            tracing::warn!(error = crate::machine::one_line(&error), "the working set is not told");
        }
        if self.channel.send(&FromFork::Acknowledged { generation, nonce, stamps: *stamps }, &[]).is_err() {
            std::process::exit(1);
        }
        // Whoever waits for the acknowledgement goes first, where cores are scarce.
        std::thread::yield_now();
    }
}
