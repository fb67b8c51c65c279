//! A running machine: one thread per vCPU, of which the caller's own runs the lead.
//!
//! The lead vCPU of a fork is the one that stands at the forkpoint: the thread that reads the activation is the
//! thread that enters the guest, with no hand-over between. (KVM_RUN from a changing thread would also wait for a
//! grace period.)

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use forkling_proto::hypercall;

use super::{Error, Forkpoint, Machine, Paused};
use crate::{
    devices::Devices,
    memory::GuestRam,
    protocol::StopReason,
    sys::kick::{KickHandle, Kickable},
    vcpu::{Hypercall, Stop, Vcpu},
};

/// What the world outside wants to know at once, without the guest being stopped.
pub trait Observer: Send + Sync {
    /// The guest acknowledged its identity. Called on the vCPU's thread, which goes on afterwards.
    fn acknowledged(&self, generation: u64, nonce: u64);
}

/// Why the machine stands still.
#[derive(Debug)]
pub enum Halt {
    /// The guest is at a forkpoint.
    Forkpoint(Forkpoint),
    /// Somebody outside wants the machine ([`Interrupter`]).
    Interrupted,
    /// The guest ended or cannot go on.
    Ended(StopReason),
}

/// Makes the machine whose lead vCPU runs on the thread that made this stand still.
#[derive(Clone, Debug)]
pub struct Interrupter {
    wanted: Arc<AtomicBool>,
    lead: KickHandle,
}

impl Interrupter {
    /// For machines that the calling thread runs.
    pub fn of_this_thread() -> Self {
        Self { wanted: Arc::new(AtomicBool::new(false)), lead: KickHandle::of_this_thread() }
    }

    /// Ends the current [`Machine::wait`], or the next one, with [`Halt::Interrupted`].
    pub fn interrupt(&self) {
        self.wanted.store(true, Ordering::SeqCst);
        // The thread is the process's first and lives as long as it.
        let _ = self.lead.kick();
    }
}

/// The state of a machine whose vCPUs run.
pub struct Running {
    lead: Vcpu,
    kickable: Kickable,
    others: Vec<Other>,
    shared: Arc<Shared>,
}

struct Other {
    kick: KickHandle,
    thread: JoinHandle<Vcpu>,
}

/// What the vCPU threads of one machine share.
struct Shared {
    devices: Arc<Devices>,
    ram: GuestRam,
    observer: Arc<dyn Observer>,
    /// Set before vCPUs are kicked to make them return.
    pausing: AtomicBool,
    /// The first halt of a vCPU other than the lead.
    halt: Mutex<Option<Result<Halt, Error>>>,
    lead: KickHandle,
}

impl Machine<Paused> {
    /// Starts all vCPUs but `lead`, which [`Machine::wait`] runs on the calling thread.
    ///
    /// # Panics
    /// When there is no vCPU `lead`.
    pub fn resume(self, lead: u8, observer: Arc<dyn Observer>) -> Result<Machine<Running>, Error> {
        let Machine { core, state: Paused { vcpus } } = self;
        let (mut leads, others): (Vec<Vcpu>, Vec<Vcpu>) =
            vcpus.into_iter().partition(|vcpu| vcpu.id() == lead);
        let mut lead = leads.pop().expect("the lead was validated");
        let (kickable, lead_kick) = Kickable::enter(lead.fd_mut());
        let shared = Arc::new(Shared {
            devices: core.devices.clone(),
            ram: core.memory.ram().clone(),
            observer,
            pausing: AtomicBool::new(false),
            halt: Mutex::new(None),
            lead: lead_kick,
        });
        let others = others.into_iter().map(|vcpu| start(vcpu, &shared)).collect::<Result<_, Error>>()?;
        Ok(Machine { core, state: Running { lead, kickable, others, shared } })
    }
}

impl Machine<Running> {
    /// Runs the lead vCPU until any vCPU halts or `interrupter` is used. The others go on running until
    /// [`Machine::pause`].
    pub fn wait(&mut self, interrupter: &Interrupter) -> Result<Halt, Error> {
        let Running { lead, shared, .. } = &mut self.state;
        loop {
            // Before each entry: an interruption that came between two of them kicked nobody.
            if interrupter.wanted.swap(false, Ordering::SeqCst) {
                return Ok(Halt::Interrupted);
            }
            if let Some(halt) = shared.drive(lead)? {
                return Ok(halt);
            }
            if let Some(halt) = shared.halt.lock().expect("no vCPU thread panics").take() {
                return halt;
            }
        }
    }

    /// Stops all vCPUs, each after its current instruction.
    pub fn pause(self) -> Result<Machine<Paused>, Error> {
        let Machine { core, state: Running { lead, kickable, others, shared } } = self;
        shared.pausing.store(true, Ordering::SeqCst);
        let mut vcpus = vec![lead];
        for other in others {
            // ESRCH: the thread has ended by itself.
            let _ = other.kick.kick();
            vcpus.push(other.thread.join().expect("no vCPU thread panics"));
        }
        drop(kickable);
        vcpus.sort_by_key(Vcpu::id);
        for vcpu in &mut vcpus {
            vcpu.complete_exit()?;
        }
        Ok(Machine { core, state: Paused { vcpus } })
    }
}

/// Runs a vCPU on a thread of its own; returns once the thread can be kicked.
fn start(mut vcpu: Vcpu, shared: &Arc<Shared>) -> Result<Other, Error> {
    let shared = shared.clone();
    let (send_kick, receive_kick) = std::sync::mpsc::channel();
    let body = move || {
        let (kickable, kick) = Kickable::enter(vcpu.fd_mut());
        send_kick.send(kick).expect("the starter waits");
        let halt = loop {
            match shared.drive(&mut vcpu).transpose() {
                Some(halt) => break Some(halt),
                None if shared.pausing.load(Ordering::SeqCst) => break None,
                None => {}
            }
        };
        if let Some(halt) = halt {
            shared.halt.lock().expect("no vCPU thread panics").get_or_insert(halt);
            // The lead runs as long as its machine does.
            shared.lead.kick().expect("the lead thread exists");
        }
        drop(kickable);
        vcpu
    };
    let builder = std::thread::Builder::new().name("vcpu".into()).stack_size(super::STACK);
    let thread = builder.spawn(body).map_err(Error::Thread)?;
    let kick = receive_kick.recv().expect("the thread sends before it runs");
    Ok(Other { kick, thread })
}

impl Shared {
    /// Runs one vCPU until it halts, or (`None`) is kicked.
    fn drive(&self, vcpu: &mut Vcpu) -> Result<Option<Halt>, Error> {
        loop {
            match vcpu.run(&self.devices)? {
                Stop::Kicked => return Ok(None),
                Stop::Ended(reason) => return Ok(Some(Halt::Ended(reason))),
                Stop::Hypercall(Hypercall { call: hypercall::ACKNOWLEDGE, first, second }) => {
                    self.observer.acknowledged(first, second);
                }
                Stop::Hypercall(call) => return self.halting_call(vcpu, call).map(Some),
            }
        }
    }

    fn halting_call(&self, vcpu: &Vcpu, call: Hypercall) -> Result<Halt, Error> {
        match call.call {
            hypercall::FORKPOINT => match Forkpoint::locate(vcpu, &self.ram, call.first, call.second)? {
                Some(forkpoint) => Ok(Halt::Forkpoint(forkpoint)),
                None => {
                    let Hypercall { first, second, .. } = call;
                    let message = format!("its mailbox ({second} bytes at {first:#x}) is not in memory");
                    Ok(Halt::Ended(StopReason::AgentFailed(message)))
                }
            },
            hypercall::FAIL => {
                let message = super::forkpoint::read_text(vcpu, &self.ram, call.first, call.second)?;
                Ok(Halt::Ended(StopReason::AgentFailed(message)))
            }
            unknown => Ok(Halt::Ended(StopReason::AgentFailed(format!("unknown hypercall {unknown}")))),
        }
    }
}
