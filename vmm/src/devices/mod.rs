//! The closed set of devices a guest has.
//!
//! Principles:
//! 1. A device is a value behind one short lock; vCPU threads use its registers, one event loop thread its data. Each
//!    lock is a leaf: nobody who holds one takes another, so there is no order to keep.
//! 2. Three kinds of data: `State` (what the guest sees; saved), `Backend` (what the host lends; never saved), and a
//!    fork's identity, of which no device has any: forks differ by what their backends lead to.
//! 3. Restore is a constructor, and its input is not trusted.
//!
//! System calls of [`Devices::new`] and [`Devices::restore`]: nine eventfds (an interrupt each for console, vsock,
//! pmem, rng and net; a kick each for the last four), five `epoll_ctl`. No thread, no other descriptor; the machine adds
//! five irqfds and two ioeventfds, since what rng and pmem are kicked for is done by the vCPU that kicks.
//!
//! Dropping devices closes their descriptors and leaves epoll alone, so a process that was made by fork(2) can drop
//! its copy without a trace in its parent's event loop.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use mio::{Interest, Registry, Token, event::Event, unix::SourceFd};
use vmm_sys_util::eventfd::EventFd;

use self::cmos::Cmos;
use self::serial::Serial;
use self::virtio::vsock::connection::Readiness;
use self::virtio::{MmioTransport, VirtioDevice, net::Net, pmem::Pmem, rng::Rng, vsock, vsock::Vsock};
use crate::memory::GuestRam;
use crate::memory::layout::{SERIAL_GSI, Slot};
use crate::protocol::Opening;

pub mod bus;
pub mod cmos;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod reset;
pub mod serial;
pub mod state;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod testing;
#[cfg(test)]
mod tests;
pub mod virtio;

pub use bus::Effect;
pub use state::DeviceStates;

/// Tokens of the devices in the event loop's epoll; all others are free for the machine.
pub const TOKENS: Range<usize> = FIRST_TOKEN..FIRST_STREAM_TOKEN + vsock::MAX_CONNECTIONS;

/// The kick of slot n has this token plus n.
const FIRST_TOKEN: usize = 0x1_0000;

/// The net device's descriptor.
const FRAMES_TOKEN: usize = 0x1_8000;

/// The stream in vsock's slot n has this token plus n.
const FIRST_STREAM_TOKEN: usize = 0x2_0000;

/// Which devices a template has. Console, clock, vsock and rng always are.
#[derive(Clone, Debug, Default)]
pub struct DeviceConfig {
    /// Whether there is a root image.
    pub pmem: bool,
    /// Whether there is a NIC.
    pub net: bool,
}

/// What the host lends.
#[derive(Debug)]
pub struct Backends {
    /// The event loop's epoll (`poll.registry().try_clone()`); all events with [`TOKENS`] go to [`Devices::on_event`].
    pub registry: Registry,
    /// Woken on console output; the machine's own waker will do.
    pub console: serial::Backend,
    /// The root image, exactly if the configuration or state has one.
    pub pmem: Option<virtio::pmem::Backend>,
    /// Where the NIC's frames go, exactly if the configuration or state has one.
    pub net: Option<virtio::net::Backend>,
}

/// All devices of one guest.
#[derive(Debug)]
pub struct Devices {
    serial: Mutex<Serial>,
    /// Kept out of the lock for the machine.
    serial_irq: Arc<EventFd>,
    cmos: Mutex<Cmos>,
    vsock: MmioTransport<Vsock>,
    pmem: Option<MmioTransport<Pmem>>,
    rng: MmioTransport<Rng>,
    net: Option<MmioTransport<Net>>,
}

/// Why devices cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No eventfd.
    #[error("the host has no eventfd left: {0}; raise its limit of open files")]
    EventFd(io::Error),
    /// No epoll entry.
    #[error("a device's kicks cannot be watched: {0}; raise fs.epoll.max_user_watches")]
    Watch(io::Error),
    /// A saved value that cannot be.
    #[error("the snapshot is damaged: {device} has an impossible {field}; rebuild the template")]
    Field {
        /// The device.
        device: &'static str,
        /// What is wrong with it.
        field: &'static str,
    },
    /// A saved register or queue that cannot be.
    #[error(
        "the snapshot is damaged: the virtio device in slot {slot:?} has an impossible {field}; rebuild the template"
    )]
    Transport {
        /// The device's slot.
        slot: Slot,
        /// What is wrong with it.
        field: &'static str,
    },
    /// There is a root image without a device for it, or a device without an image.
    #[error("a root image is {} but {}; give the template's own", found(*given), expected(*given))]
    Root {
        /// Whether there is an image.
        given: bool,
    },
    /// There is a NIC without a wire, or a wire without a NIC.
    #[error("a frame socket is {} but {}; both sides must be of one build", found(*given), wanted(*given))]
    Wire {
        /// Whether there is a socket.
        given: bool,
    },
    /// The root image cannot be mapped into the guest.
    #[error(
        "a root image of {0} bytes cannot be a device; it must be a multiple of 2 MiB and at most 896 GiB"
    )]
    RootSize(u64),
    /// The root image is another one.
    #[error(
        "the root image has {given} bytes, the snapshot was made with one of {saved}; give the template's own"
    )]
    RootChanged {
        /// Size when the state was saved.
        saved: u64,
        /// Size now.
        given: u64,
    },
}

fn found(given: bool) -> &'static str {
    if given { "given" } else { "missing" }
}

fn expected(given: bool) -> &'static str {
    if given { "the template has no device for it" } else { "the template has a device for it" }
}

fn wanted(given: bool) -> &'static str {
    if given { "the template has no NIC" } else { "the template has a NIC" }
}

impl Devices {
    /// Devices after power-on. Errors: the host's limits; a root image that cannot be.
    pub fn new(config: &DeviceConfig, backends: Backends, ram: GuestRam) -> Result<Self, Error> {
        let Backends { registry, console, pmem, net } = backends;
        let pmem = match (config.pmem, pmem) {
            (false, None) => None,
            (true, Some(backend)) => Some(MmioTransport::new(Slot::Pmem, Pmem::new(backend)?, ram.clone())?),
            (_, given) => return Err(Error::Root { given: given.is_some() }),
        };
        let net = match (config.net, net) {
            (false, None) => None,
            (true, Some(backend)) => Some(MmioTransport::new(Slot::Net, Net::new(backend), ram.clone())?),
            (_, given) => return Err(Error::Wire { given: given.is_some() }),
        };
        let vsock = Vsock::new(vsock_backend(registry));
        let vsock = MmioTransport::new(Slot::Vsock, vsock, ram.clone())?;
        let rng = MmioTransport::new(Slot::Rng, Rng, ram)?;
        Self::assemble(Serial::new(console)?, Cmos::default(), vsock, pmem, rng, net)
    }

    /// Continues from saved states. [`Self::kick`] is to be called next, when the interrupts are connected.
    /// Errors: a state that cannot be, or not with these backends; the host's limits.
    pub fn restore(states: &DeviceStates, backends: Backends, ram: GuestRam) -> Result<Self, Error> {
        let Backends { registry, console, pmem: root, net: wire } = backends;
        let DeviceStates { serial, cmos, vsock, pmem, rng, net } = states;
        let pmem = match (pmem, root) {
            (None, None) => None,
            (Some(state), Some(backend)) => {
                let device = Pmem::restore(&state.device, backend)?;
                Some(MmioTransport::restore(Slot::Pmem, state, device, ram.clone())?)
            }
            (_, given) => return Err(Error::Root { given: given.is_some() }),
        };
        let net = match (net, wire) {
            (None, None) => None,
            (Some(state), Some(backend)) => {
                let device = Net::restore(&state.device, backend)?;
                Some(MmioTransport::restore(Slot::Net, state, device, ram.clone())?)
            }
            (_, given) => return Err(Error::Wire { given: given.is_some() }),
        };
        let device = Vsock::restore(&vsock.device, vsock_backend(registry))?;
        let vsock = MmioTransport::restore(Slot::Vsock, vsock, device, ram.clone())?;
        let rng = MmioTransport::restore(Slot::Rng, rng, Rng::restore(&rng.device), ram)?;
        let serial = Serial::restore(serial, console)?;
        Self::assemble(serial, Cmos::restore(cmos)?, vsock, pmem, rng, net)
    }

    fn assemble(
        serial: Serial,
        cmos: Cmos,
        vsock: MmioTransport<Vsock>,
        pmem: Option<MmioTransport<Pmem>>,
        rng: MmioTransport<Rng>,
        net: Option<MmioTransport<Net>>,
    ) -> Result<Self, Error> {
        let serial_irq = serial.irq();
        let devices =
            Self { serial: Mutex::new(serial), serial_irq, cmos: Mutex::new(cmos), vsock, pmem, rng, net };
        devices.vsock.with_device(|vsock| devices.watch_kicks(vsock.registry())).map_err(Error::Watch)?;
        Ok(devices)
    }

    fn watch_kicks(&self, registry: &Registry) -> io::Result<()> {
        let by_vcpus = self.pmem.iter().map(kick_of).chain([kick_of(&self.rng)]);
        self.kicks().chain(by_vcpus).try_for_each(|kick| {
            let token = Token(FIRST_TOKEN + kick.slot as usize);
            registry.register(&mut SourceFd(&kick.fd.as_raw_fd()), token, Interest::READABLE)
        })?;
        let watch =
            |net: &MmioTransport<Net>| net.with_device(|net| net.watch(registry, Token(FRAMES_TOKEN)));
        self.net.iter().try_for_each(watch)
    }

    /// The guest-visible state of all devices. The caller has stopped the vCPUs and is the event loop's thread.
    pub fn save(&self) -> DeviceStates {
        let Self { serial, serial_irq: _, cmos, vsock, pmem, rng, net } = self;
        DeviceStates {
            serial: lock(serial).save(),
            cmos: lock(cmos).save(),
            vsock: vsock.save(),
            pmem: pmem.as_ref().map(MmioTransport::save),
            rng: rng.save(),
            net: net.as_ref().map(MmioTransport::save),
        }
    }

    /// Goes to saved states in place: streams of the guest are closed, console output that was not read is lost.
    /// [`Self::kick`] is to be called next. The caller has stopped the vCPUs and the event loop.
    /// Errors: as for [`Self::restore`].
    pub fn rewind(&self, states: &DeviceStates) -> Result<(), Error> {
        let DeviceStates { serial, cmos, vsock, pmem, rng, net } = states;
        lock(&self.serial).rewind(serial)?;
        *lock(&self.cmos) = Cmos::restore(cmos)?;
        self.vsock.rewind(vsock)?;
        match (&self.pmem, pmem) {
            (None, None) => {}
            (Some(device), Some(state)) => device.rewind(state)?,
            (device, _) => return Err(Error::Root { given: device.is_some() }),
        }
        match (&self.net, net) {
            (None, None) => {}
            (Some(device), Some(state)) => device.rewind(state)?,
            (device, _) => return Err(Error::Wire { given: device.is_some() }),
        }
        self.rng.rewind(rng)
    }

    /// From now on frames pass between the guest's NIC, if it has one, and its wire. New, restored and rewound devices are
    /// unplugged.
    pub fn plug(&self) {
        self.net.iter().for_each(|net| net.with_device(Net::plug));
    }

    /// Touches those pages of the guest's that its NIC, unplugged, has no need of, and plugged in has: they are part of what a fork touches.
    pub fn look_for_buffers(&self) {
        if let Some(net) = &self.net {
            // A driver that breaks the rules is told so, by this as by any look.
            let _ = net.run(|_, queues| Net::look_for_buffer(queues));
        }
    }

    /// Every interrupt: its GSI and the eventfd to make an irqfd of.
    pub fn interrupts(&self) -> impl Iterator<Item = (u32, &EventFd)> {
        let pmem = self.pmem.iter().map(|pmem| (Slot::Pmem.gsi(), pmem.irq()));
        let net = self.net.iter().map(|net| (Slot::Net.gsi(), net.irq()));
        [
            (SERIAL_GSI, &*self.serial_irq),
            (Slot::Vsock.gsi(), self.vsock.irq()),
            (Slot::Rng.gsi(), self.rng.irq()),
        ]
        .into_iter()
        .chain(pmem)
        .chain(net)
    }

    /// Every address at which a driver kicks the event loop. An ioeventfd there spares the vCPU a trip out of the kernel; without one a
    /// kick arrives at [`Self::mmio_write`] and has the same effect. Kicks of the other devices arrive there, too, and the vCPU that
    /// kicked does what is wanted ([`VirtioDevice::BY_VCPU`]).
    pub fn kicks(&self) -> impl Iterator<Item = Kick<'_>> {
        [kick_of(&self.vsock)].into_iter().chain(self.net.iter().map(kick_of))
    }

    /// Starts restored devices: work that was pending when they were saved is done and what the guest may be waiting
    /// for is repeated. Once after [`Self::restore`], with interrupts connected and interrupt controllers restored,
    /// before the guest runs. A guest at rest gets no interrupt from it.
    pub fn kick(&self) {
        lock(&self.serial).kick();
        self.vsock.kick();
        self.pmem.iter().for_each(MmioTransport::kick);
        self.rng.kick();
        self.net.iter().for_each(MmioTransport::kick);
    }

    /// Handles an event of the event loop. False: it is none of the devices'.
    pub fn on_event(&self, event: &Event) -> bool {
        let token = event.token().0;
        if let Some(slot) =
            token.checked_sub(FIRST_STREAM_TOKEN).filter(|&slot| slot < vsock::MAX_CONNECTIONS)
        {
            let ready = Readiness {
                readable: event.is_readable() || event.is_read_closed(),
                writable: event.is_writable(),
                hung_up: event.is_write_closed(),
            };
            let _ = self.vsock.run(|vsock, queues| vsock.on_ready(queues, slot, ready));
            return true;
        }
        if token == FRAMES_TOKEN {
            if let Some(net) = &self.net {
                let _ = net.run(|net, queues| net.on_ready(queues, event.is_readable()));
            }
            return true;
        }
        let slot = Slot::ALL.into_iter().find(|&slot| FIRST_TOKEN + slot as usize == token);
        match slot {
            Some(Slot::Vsock) => self.vsock.process(),
            Some(Slot::Pmem) => self.pmem.iter().for_each(MmioTransport::process),
            Some(Slot::Rng) => self.rng.process(),
            Some(Slot::Net) => self.net.iter().for_each(MmioTransport::process),
            None => return false,
        }
        true
    }

    /// Whether the guest is owed an interrupt that can wait a moment; then [`Self::settle`] is to be called.
    pub fn owes_interrupt(&self) -> bool {
        self.vsock.owes_interrupt()
    }

    /// Interrupts the guest where it is owed that.
    pub fn settle(&self) {
        self.vsock.settle();
    }

    /// Joins `stream`, a connected stream socket, with the guest's vsock `port`. If the guest refuses, the stream is
    /// closed; so it is on an error. Called by the event loop's thread, or before the guest runs.
    pub fn connect(&self, port: u32, stream: OwnedFd, opening: Opening) -> Result<(), vsock::ConnectError> {
        let connected = self.vsock.run(|vsock, queues| vsock.connect(queues, port, stream, opening));
        let slot = connected.ok_or(vsock::ConnectError::NotReady)??;
        // After the guest was interrupted, so that it works while epoll is told.
        self.vsock.with_device(|vsock| vsock.watch(slot))
    }

    /// The guest's vsock device, for what concerns its host side alone.
    pub fn with_vsock<T>(&self, work: impl FnOnce(&mut Vsock) -> T) -> T {
        self.vsock.with_device(work)
    }

    /// Answers the guest's question for a host port; see [`Vsock::dialled`]. Called by the event loop's thread.
    pub fn dialled(&self, token: u64, stream: Option<OwnedFd>) {
        let slot = self.vsock.run(|vsock, queues| vsock.dialled(queues, token, stream)).flatten();
        if let Some(slot) = slot {
            // A stream that cannot be watched is aborted there, which is all there is to say of it.
            let _ = self.vsock.with_device(|vsock| vsock.watch(slot));
        }
    }

    /// Ends forwarded streams; see [`Vsock::cut`]. Called by the event loop's thread.
    pub fn cut(&self, group: u32) {
        let _ = self.vsock.run(|vsock, queues| vsock.cut(queues, group));
    }

    /// Console output from byte number `from` on, at most `max` bytes: their numbers and themselves. The end of the
    /// range is the next `from`; a gap means that the ring overflowed.
    pub fn console(&self, from: u64, max: usize) -> (Range<u64>, Vec<u8>) {
        lock(&self.serial).output(from, max)
    }
}

/// Where a driver kicks.
#[derive(Clone, Copy, Debug)]
pub struct Kick<'a> {
    /// The device's slot.
    pub slot: Slot,
    /// Guest-physical address; the access has 4 bytes and any value, for all queues of the device.
    pub gpa: u64,
    /// Eventfd to be written.
    pub fd: &'a EventFd,
}

fn kick_of<D: VirtioDevice>(device: &MmioTransport<D>) -> Kick<'_> {
    Kick { slot: device.slot(), gpa: device.notify_address(), fd: device.notify() }
}

fn vsock_backend(registry: Registry) -> vsock::Backend {
    vsock::Backend { registry, first_token: FIRST_STREAM_TOKEN }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no thread panics while it holds a device")
}
