//! The memory-mapped transport (virtio 1.2, 4.2, version 2): registers, queues and interrupt of one device.
//!
//! Locks: the transport has one, a leaf; no code holds two. The three registers a running driver uses for every
//! interrupt and kick (InterruptStatus, InterruptACK, QueueNotify) do without it, so a vCPU never waits for the event
//! loop's data path.
//!
//! Eventfds: `irq`, written to interrupt the guest (irqfd, edge-triggered GSI), and `notify`, written when the driver
//! kicks. One `notify` serves all queues of the device: a kick is one of them at most, and looking at an idle queue
//! is one memory read, cheaper than an eventfd, an ioeventfd and an epoll entry each. It is watched edge-triggered
//! and never read: each write is an edge of its own.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};

use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::registers::{DRIVER_OK, NEEDS_RESET, Registers};
use super::queue::Outcome;
use super::{Queues, Violation, VirtioDevice};
use crate::devices::Error;
use crate::memory::{GuestRam, layout::Slot};

pub mod registers;
pub mod state;
#[cfg(test)]
mod tests;

pub use state::{MmioState, QueueState};

/// "The device used a buffer" in InterruptStatus.
pub const USED_BUFFER: u32 = 1;

/// "The configuration changed" in InterruptStatus; here always because DEVICE_NEEDS_RESET was set.
pub const CONFIG_CHANGE: u32 = 2;

/// The interrupt of a device.
#[derive(Debug)]
struct Interrupt {
    status: AtomicU32,
    fd: EventFd,
    /// Completions the driver was not told of yet ([`VirtioDevice::LAZY_QUEUES`]). Written with the lock held.
    owed: AtomicU32,
}

impl Interrupt {
    fn raise(&self, cause: u32) {
        self.status.fetch_or(cause, Ordering::SeqCst);
        self.signal();
    }

    /// "The device used a buffer", with all that is owed.
    fn used_buffer(&self) {
        self.owed.store(0, Ordering::SeqCst);
        self.raise(USED_BUFFER);
    }

    /// Forgets everything.
    fn reset(&self, status: u32) {
        self.owed.store(0, Ordering::SeqCst);
        self.status.store(status, Ordering::SeqCst);
    }

    fn signal(&self) {
        // Fails only if the counter is full, and then the interrupt is on its way already.
        let _ = self.fd.write(1);
    }
}

/// A virtio device with its registers. Shared by vCPU threads and the event loop.
#[derive(Debug)]
pub struct MmioTransport<D> {
    slot: Slot,
    ram: GuestRam,
    irq: Interrupt,
    notify: EventFd,
    inner: Mutex<Inner<D>>,
}

#[derive(Debug)]
struct Inner<D> {
    registers: Registers,
    queues: Vec<Queue>,
    device: D,
    /// Violations logged; a guest can make any number.
    logged: u32,
}

/// Most violations logged per device.
const MAX_LOGGED: u32 = 10;

impl<D: VirtioDevice> MmioTransport<D> {
    /// A device after power-on. Two eventfds. Errors: the host has none to give.
    pub fn new(slot: Slot, device: D, ram: GuestRam) -> Result<Self, Error> {
        let queues = D::QUEUE_SIZES
            .iter()
            .map(|&size| Queue::new(size).expect("queue sizes are powers of two"))
            .collect();
        Self::assemble(slot, ram, 0, Inner { registers: Registers::default(), queues, device, logged: 0 })
    }

    /// Continues from a saved state; `device` is restored already. Errors: no driver and device can have come to
    /// this state in this RAM; no eventfd.
    pub fn restore(slot: Slot, state: &MmioState<D::State>, device: D, ram: GuestRam) -> Result<Self, Error> {
        let invalid = |field| Error::Transport { slot, field };
        let registers = state.registers(offered(&device)).map_err(invalid)?;
        let queues = state.queues(D::QUEUE_SIZES, &registers, &ram).map_err(invalid)?;
        let interrupt_status = state.interrupt_status().map_err(invalid)?;
        let mut inner = Inner { registers, queues, device, logged: 0 };
        inner.agreed();
        Self::assemble(slot, ram, interrupt_status, inner)
    }

    fn assemble(slot: Slot, ram: GuestRam, interrupt_status: u32, inner: Inner<D>) -> Result<Self, Error> {
        let eventfd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::EventFd);
        let irq =
            Interrupt { status: AtomicU32::new(interrupt_status), fd: eventfd()?, owed: AtomicU32::new(0) };
        Ok(Self { slot, ram, irq, notify: eventfd()?, inner: Mutex::new(inner) })
    }

    /// Goes to a saved state in place. The caller has stopped the vCPUs. Errors: as for [`Self::restore`], except that
    /// no eventfd is needed.
    pub fn rewind(&self, state: &MmioState<D::State>) -> Result<(), Error> {
        let slot = self.slot;
        let invalid = |field| Error::Transport { slot, field };
        let mut inner = lock(&self.inner);
        inner.reset();
        inner.registers = state.registers(offered(&inner.device)).map_err(invalid)?;
        inner.queues = state.queues(D::QUEUE_SIZES, &inner.registers, &self.ram).map_err(invalid)?;
        inner.device.rewind(&state.device)?;
        inner.agreed();
        self.irq.reset(state.interrupt_status().map_err(invalid)?);
        Ok(())
    }

    /// The guest-visible state. The caller has stopped the vCPUs.
    pub fn save(&self) -> MmioState<D::State> {
        // Slot, RAM, eventfds and log are the machine's; the rest is state.
        let Self { slot: _, ram: _, irq, notify: _, inner } = self;
        let Inner { registers, queues, device, logged: _ } = &*lock(inner);
        let owed = if irq.owed.load(Ordering::SeqCst) > 0 { USED_BUFFER } else { 0 };
        MmioState::new(registers, irq.status.load(Ordering::SeqCst) | owed, queues, device.save())
    }

    /// Where the device is.
    pub fn slot(&self) -> Slot {
        self.slot
    }

    /// Written to interrupt the guest; the machine makes it an irqfd of the slot's GSI.
    pub fn irq(&self) -> &EventFd {
        &self.irq.fd
    }

    /// Written on a kick; the machine makes it an ioeventfd of the slot's QueueNotify, without datamatch, unless the work is the vCPU's own
    /// ([`VirtioDevice::BY_VCPU`]).
    pub fn notify(&self) -> &EventFd {
        &self.notify
    }

    /// A guest's read at byte `offset` of the slot.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == registers::INTERRUPT_STATUS && data.len() == 4 {
            data.copy_from_slice(&self.irq.status.load(Ordering::SeqCst).to_le_bytes());
            return;
        }
        let inner = lock(&self.inner);
        if let Some(offset) = offset.checked_sub(registers::CONFIG) {
            inner.device.read_config(offset, data);
            return;
        }
        data.fill(0);
        if data.len() == 4 {
            data.copy_from_slice(&inner.read_register(offset).to_le_bytes());
        }
    }

    /// A guest's write at byte `offset` of the slot.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let value = <[u8; 4]>::try_from(data).map(u32::from_le_bytes);
        match (offset, value) {
            (registers::INTERRUPT_ACK, Ok(value)) => {
                self.irq.status.fetch_and(!value, Ordering::SeqCst);
            }
            (registers::QUEUE_NOTIFY, Ok(_)) if D::BY_VCPU => self.process(),
            // Trapped, because the machine has no ioeventfd there (yet).
            (registers::QUEUE_NOTIFY, Ok(_)) => self.rerun(),
            _ => self.write_locked(offset, value.ok(), data),
        }
    }

    fn write_locked(&self, offset: u64, value: Option<u32>, data: &[u8]) {
        let mut inner = lock(&self.inner);
        let written = match (offset.checked_sub(registers::CONFIG), value) {
            (Some(offset), _) => inner.device.write_config(offset, data),
            (None, Some(value)) if offset == registers::STATUS => self.write_status(&mut inner, value),
            (None, Some(value)) => inner.write_register(offset, value, &self.ram),
            (None, None) => Err(Violation::Register(offset)),
        };
        if let Err(violation) = written {
            self.fail(&mut inner, violation);
        }
    }

    fn write_status(&self, inner: &mut Inner<D>, status: u32) -> Result<(), Violation> {
        if status == 0 {
            inner.reset();
            self.irq.reset(0);
            return Ok(());
        }
        let was_running = inner.is_running();
        inner.registers.advance(status, offered(&inner.device))?;
        if inner.is_running() && !was_running {
            let event_idx = inner.registers.has(registers::EVENT_IDX);
            inner.queues.iter_mut().for_each(|queue| queue.set_event_idx(event_idx));
            inner.agreed();
            inner.device.activate();
            // The driver may have filled and kicked its queues while it set them up.
            self.rerun();
        }
        Ok(())
    }

    /// The driver broke the rules: stop the device until it is reset.
    fn fail(&self, inner: &mut Inner<D>, violation: Violation) {
        if inner.registers.status & NEEDS_RESET == 0 {
            if inner.logged < MAX_LOGGED {
                inner.logged += 1;
                tracing::warn!(slot = ?self.slot, %violation, "stopped until the guest's driver resets it");
            }
            inner.registers.status |= NEEDS_RESET;
            self.irq.owed.store(0, Ordering::SeqCst);
            inner.device.reset();
        }
        if inner.registers.status & DRIVER_OK != 0 {
            self.irq.raise(CONFIG_CHANGE);
        }
    }

    /// Makes the event loop call [`Self::process`] (again).
    fn rerun(&self) {
        // Fails only if the counter is full, and then the loop has an event to handle already.
        let _ = self.notify.write(1);
    }

    /// Works on the queues. Called by the event loop when `notify` was written, or by the vCPU that kicked.
    pub fn process(&self) {
        let _ = self.run(|device, queues| device.process(queues));
    }

    /// Calls `work` with the device and its queues if the driver is ready and sound, then interrupts the guest if it
    /// wants that. `None`: it is not.
    pub fn run<T>(&self, work: impl FnOnce(&mut D, &mut Queues<'_>) -> Result<T, Violation>) -> Option<T> {
        let mut guard = lock(&self.inner);
        let inner = &mut *guard;
        if !inner.is_running() {
            return None;
        }
        let mut queues = Queues::new(&self.ram, &mut inner.queues, D::LAZY_QUEUES);
        let worked = work(&mut inner.device, &mut queues);
        let owed = self.irq.owed.load(Ordering::SeqCst);
        match worked.and_then(|done| Ok((done, queues.finish(owed)?))) {
            Ok((done, Outcome { interrupt, owed, unfinished })) => {
                if interrupt {
                    self.irq.used_buffer();
                } else {
                    self.irq.owed.store(owed, Ordering::SeqCst);
                }
                if unfinished {
                    self.rerun();
                }
                Some(done)
            }
            Err(violation) => {
                self.fail(inner, violation);
                None
            }
        }
    }

    /// Whether the driver is to hear of completions for which it was not interrupted yet: [`Self::settle`] is to be called in
    /// a moment.
    pub fn owes_interrupt(&self) -> bool {
        self.irq.owed.load(Ordering::SeqCst) > 0
    }

    /// Interrupts the guest if it is owed that.
    pub fn settle(&self) {
        let _inner = lock(&self.inner);
        if self.owes_interrupt() {
            self.irq.used_buffer();
        }
    }

    /// Calls `work` with the device alone, whatever the driver's state.
    pub fn with_device<T>(&self, work: impl FnOnce(&mut D) -> T) -> T {
        work(&mut lock(&self.inner).device)
    }

    /// Starts a restored device: takes up work the saved machine had been kicked for, and repeats an interrupt that
    /// the guest had not acknowledged, since it may have been lost on its way into the saved interrupt controller.
    /// A device at rest does not interrupt: the guest's first instructions stay its own.
    pub fn kick(&self) {
        if self.irq.status.load(Ordering::SeqCst) != 0 {
            self.irq.signal();
        }
        self.process();
        self.settle();
    }

    /// Guest-physical address of QueueNotify, 4 bytes: where a kick is written.
    pub fn notify_address(&self) -> u64 {
        self.slot.mmio_base() + registers::QUEUE_NOTIFY
    }
}

impl<D: VirtioDevice> Inner<D> {
    fn is_running(&self) -> bool {
        self.registers.status & (DRIVER_OK | NEEDS_RESET | registers::FAILED) == DRIVER_OK
    }

    /// Tells the device what its driver, if it runs, has agreed to.
    fn agreed(&mut self) {
        if self.is_running() {
            self.device.agreed(self.registers.driver_features);
        }
    }

    fn reset(&mut self) {
        self.registers = Registers::default();
        self.queues.iter_mut().for_each(QueueT::reset);
        self.device.reset();
    }

    fn read_register(&self, offset: u64) -> u32 {
        let selected = self.queues.get(self.registers.queue_sel as usize);
        match offset {
            registers::DEVICE_ID => D::ID,
            registers::DEVICE_FEATURES => {
                registers::word(offered(&self.device), self.registers.device_features_sel)
            }
            registers::QUEUE_NUM_MAX => selected.map_or(0, |queue| queue.max_size().into()),
            registers::QUEUE_READY => selected.map_or(0, |queue| queue.ready().into()),
            _ => self.registers.read(offset),
        }
    }

    fn write_register(&mut self, offset: u64, value: u32, ram: &GuestRam) -> Result<(), Violation> {
        if !registers::is_queue_register(offset) {
            return self.registers.write(offset, value);
        }
        let index = self.registers.queue_sel as usize;
        let queue = self.queues.get_mut(index).ok_or(Violation::Register(offset))?;
        if offset == registers::QUEUE_READY && value == 0 && !queue.ready() {
            return Ok(());
        }
        // Frozen once the driver runs or the queue is ready: sizes and addresses were checked at that moment.
        let thawing = offset == registers::QUEUE_READY && value == 0;
        if !self.registers.may_set_up_queues() || queue.ready() && !thawing {
            return Err(Violation::Register(offset));
        }
        registers::write_queue(queue, offset, value, ram).map_err(|()| Violation::QueueLayout(index))
    }
}

/// All features the device offers.
fn offered<D: VirtioDevice>(device: &D) -> u64 {
    device.features() | registers::TRANSPORT_FEATURES
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no thread panics while it holds a device")
}
