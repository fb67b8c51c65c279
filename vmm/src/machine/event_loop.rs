//! The event loop: the one thread that moves data between devices and host.
//!
//! It runs beside the vCPUs and can be stopped and started again; while it is stopped no device changes.
//!
//! While pages of the guest are folded ([`Folded`]) it serves their faults, and nothing else: whatever else happens, it brings all
//! of them back first, before it touches a device. Device work reads guest memory, for whose pages this thread would wait for ever, and
//! takes locks, whose holders may be vCPU threads that wait for such a page just now. Serving faults takes none, so every vCPU
//! thread gets its page, whatever it holds; and when the loop is stopped nothing is folded any more, so that the lead vCPU's thread,
//! which alone touches the guest's memory then, never waits for a loop that stands still.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use mio::{Events, Interest, Poll, Registry, Token, Waker, unix::SourceFd};

use super::Error;
use crate::{
    devices::{
        self, Backends, Devices, serial,
        virtio::{net, pmem},
    },
    memory::folded::{Folded, Rest},
};

/// The waker's token; the devices' are in [`devices::TOKENS`].
const WAKER: Token = Token(0);
/// The source's token.
const SOURCE: Token = Token(1);

/// The token of folded pages that are waited for.
const FAULTS: Token = Token(2);

const _: () = assert!(devices::TOKENS.start > FAULTS.0);

/// Events taken at a time.
const EVENTS: usize = 64;

/// How long an interrupt that the guest needs only to use its buffers again is put off.
const MOMENT: Duration = Duration::from_millis(5);

/// After how many times its patience a source is told of a rest that goes on: by then timers have brought pages back that could be
/// folded again, or all are back since the guest had touched much.
const AGAIN: u32 = 60;

/// Another descriptor the loop serves, besides the devices'.
pub trait Source: Send {
    /// The descriptor, watched for input.
    fn descriptor(&self) -> BorrowedFd<'_>;
    /// Input is there, or the other side is gone. Takes all of it.
    fn ready(&mut self, devices: &Devices);
    /// Called after each round of device work, for instance to pass on console output.
    fn after_round(&mut self, devices: &Devices);
    /// How long nothing must happen for [`Source::at_rest`] to be called, and sixty times as long to be called again; `None`: it is
    /// not.
    fn patience(&self) -> Option<Duration> {
        None
    }
    /// Nothing has happened for a while.
    fn at_rest(&mut self) {}
    /// Folded pages of the guest cannot be brought back, so that it must not go on: ends the process.
    fn guest_lost(&mut self, error: io::Error) -> ! {
        tracing::error!(error = super::one_line(&error), "memory of the guest is lost");
        std::process::exit(1)
    }
}

/// An event loop without its devices, which need its epoll to be made.
pub struct EventLoopSeed {
    poll: Poll,
    waker: Arc<Waker>,
}

impl EventLoopSeed {
    /// An empty event loop.
    pub fn new() -> Result<Self, Error> {
        let poll = Poll::new().map_err(Error::EventLoop)?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKER).map_err(Error::EventLoop)?);
        Ok(Self { poll, waker })
    }

    /// What the devices need of host and loop. `root` is the length of the root image in bytes, `frames` the NIC's wire.
    pub fn backends(&self, root: Option<u64>, frames: Option<OwnedFd>) -> Result<Backends, Error> {
        Ok(Backends {
            registry: self.poll.registry().try_clone().map_err(Error::EventLoop)?,
            console: serial::Backend { waker: Some(self.waker.clone()) },
            pmem: root.map(|size| pmem::Backend { size }),
            net: frames.map(|frames| net::Backend { frames }),
        })
    }

    /// The loop that serves `devices`, and `source` from [`RunningLoop::watch_source`] on.
    pub fn serve(self, devices: Arc<Devices>, source: Box<dyn Source>) -> EventLoop {
        let Self { poll, waker } = self;
        let told = Instant::now();
        EventLoop { poll, waker, devices, source, folded: None, owing: None, restless: false, told }
    }
}

/// An event loop that is not running.
pub struct EventLoop {
    poll: Poll,
    waker: Arc<Waker>,
    devices: Arc<Devices>,
    source: Box<dyn Source>,
    /// Pages of the guest that this thread brings back.
    folded: Option<Folded>,
    /// Since when devices owe an interrupt.
    owing: Option<Instant>,
    /// Whether anything has happened since [`Source::at_rest`] was called. Being stopped is nothing.
    restless: bool,
    /// When that was.
    told: Instant,
}

/// An event loop that runs on its own thread.
pub struct RunningLoop {
    waker: Arc<Waker>,
    registry: Registry,
    source: RawFd,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<EventLoop>,
}

impl EventLoop {
    /// Runs on a new thread.
    pub fn start(mut self) -> Result<RunningLoop, Error> {
        let waker = self.waker.clone();
        let registry = self.poll.registry().try_clone().map_err(Error::EventLoop)?;
        let source = self.source.descriptor().as_raw_fd();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let body = move || {
            let mut events = Events::with_capacity(EVENTS);
            while !stopped.load(Ordering::SeqCst) {
                self.round(&mut events);
            }
            self.unfold();
            self
        };
        let builder = std::thread::Builder::new().name("devices".into()).stack_size(super::STACK);
        let thread = builder.spawn(body).map_err(Error::Thread)?;
        Ok(RunningLoop { waker, registry, source, stop, thread })
    }

    /// Serves another source from [`RunningLoop::watch_source`] on, and its present one no more.
    pub fn with_source(self, source: Box<dyn Source>) -> Result<Self, Error> {
        let watched = self.source.descriptor().as_raw_fd();
        self.poll.registry().deregister(&mut SourceFd(&watched)).map_err(Error::EventLoop)?;
        Ok(Self { source, ..self })
    }

    /// Serves folded pages of the guest from its start on, until something else happens.
    pub fn with_folded(self, folded: Option<Folded>) -> Result<Self, Error> {
        if let Some(folded) = &folded {
            let descriptor = folded.descriptor().as_raw_fd();
            let registry = self.poll.registry();
            registry
                .register(&mut SourceFd(&descriptor), FAULTS, Interest::READABLE)
                .map_err(Error::EventLoop)?;
        }
        Ok(Self { folded, ..self })
    }

    /// Does what is waiting to be done, be it only the wake-up that stopped the loop, and tells whether anything has happened since it
    /// was at rest.
    pub fn catch_up(&mut self) -> bool {
        let mut events = Events::with_capacity(EVENTS);
        self.wait(&mut events, Some(Duration::ZERO));
        self.handle(&events);
        self.restless
    }

    fn round(&mut self, events: &mut Events) {
        let owing = self.owing.map(|since| MOMENT.saturating_sub(since.elapsed()));
        let patience = owing.or_else(|| self.patience());
        if !self.wait(events, patience) {
            return;
        }
        let resting = owing.is_none() && events.iter().all(|event| event.token() == FAULTS);
        let due = match self.folded {
            Some(_) if resting && self.patience() != Some(Duration::ZERO) => return self.serve_faults(),
            Some(_) => {
                self.unfold();
                // Something else, be it console output that counts for nothing otherwise: it has to come to rest again.
                self.restless |= !resting;
                resting
            }
            // Faults are of pages that are back by now.
            None => resting && events.is_empty(),
        };
        if due {
            self.restless = false;
            self.told = Instant::now();
            self.source.at_rest();
        } else {
            self.handle(events);
        }
    }

    /// How long nothing may happen, from now on, until the source is told.
    fn patience(&self) -> Option<Duration> {
        let patience = self.source.patience()?;
        let again = || (patience * AGAIN).saturating_sub(self.told.elapsed());
        Some(if self.restless { patience } else { again() })
    }

    /// Waits for events, at most so long; `false` if a signal came instead.
    fn wait(&mut self, events: &mut Events, patience: Option<Duration>) -> bool {
        match self.poll.poll(events, patience) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => false,
            result => {
                result.expect("epoll_wait fails only on programmer errors");
                true
            }
        }
    }

    fn handle(&mut self, events: &Events) {
        for event in events.iter() {
            self.restless |= !matches!(event.token(), WAKER | FAULTS);
            match event.token() {
                // Faults of pages that are back by now.
                WAKER | FAULTS => {}
                SOURCE => self.source.ready(&self.devices),
                _ => {
                    let known = self.devices.on_event(event);
                    debug_assert!(known, "every token has its owner");
                }
            }
        }
        self.source.after_round(&self.devices);
        self.settle();
    }

    fn serve_faults(&mut self) {
        match self.folded.as_mut().map(Folded::serve) {
            Some(Ok(Rest::Over)) => self.unfold(),
            Some(Err(error)) => self.source.guest_lost(error),
            Some(Ok(Rest::Goes)) | None => {}
        }
    }

    /// Brings all folded pages back. Their descriptor leaves epoll as it is closed.
    fn unfold(&mut self) {
        if let Some(Err(error)) = self.folded.take().map(Folded::unfold) {
            self.source.guest_lost(error);
        }
    }

    fn settle(&mut self) {
        if !self.devices.owes_interrupt() {
            self.owing = None;
        } else if self.owing.get_or_insert_with(Instant::now).elapsed() >= MOMENT {
            self.devices.settle();
            self.owing = None;
        }
    }
}

impl RunningLoop {
    /// Begins to serve the source; what is waiting there is reported at once. Done from another thread without waking
    /// the loop for it, because a fork does it on the way into the guest.
    pub fn watch_source(&self) -> Result<(), Error> {
        self.registry
            .register(&mut SourceFd(&self.source), SOURCE, Interest::READABLE)
            .map_err(Error::EventLoop)
    }

    /// Stops the loop; all that was in progress is done.
    pub fn stop(self) -> EventLoop {
        self.stop.store(true, Ordering::SeqCst);
        self.waker.wake().expect("an eventfd takes a wake-up");
        self.thread.join().expect("the event loop does not panic")
    }
}

/// Reads a machine's console from where it last stopped.
#[derive(Default)]
pub struct ConsoleReader {
    next: u64,
}

impl ConsoleReader {
    /// New text, at most 4 KiB of it; `None` if there is none.
    pub fn read(&mut self, devices: &Devices) -> Option<Vec<u8>> {
        const MOST: usize = 4096;
        let (range, text) = devices.console(self.next, MOST);
        self.next = range.end;
        (!text.is_empty()).then_some(text)
    }
}
