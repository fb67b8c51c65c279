//! What the event loop's thread leaves for the lead vCPU's.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::AtomicBool,
        mpsc::{self, Receiver},
    },
};

use super::control::{Control, Request};
use crate::{channel::Channel, machine::Interrupter, memory::guest::GuestMemory};

/// Where the control socket's reader leaves work for the lead vCPU's thread.
pub struct Desk {
    requests: Receiver<Request>,
    /// Taken from there, and not done.
    waiting: VecDeque<Request>,
    /// Makes the lead vCPU stand still for what is urgent.
    pub interrupter: Interrupter,
    /// Set when the fork is activated.
    pub active: Arc<AtomicBool>,
}

impl Desk {
    /// A desk and who serves it. Called by the thread that runs the lead vCPU.
    pub fn open(control: &Arc<Channel>, memory: &GuestMemory) -> (Self, Box<Control>) {
        let (sender, requests) = mpsc::channel();
        let interrupter = Interrupter::of_this_thread();
        let active = Arc::new(AtomicBool::new(false));
        let reader =
            Control::new(control.clone(), sender, interrupter.clone(), memory.clone(), active.clone());
        (Self { requests, waiting: VecDeque::new(), interrupter, active }, Box::new(reader))
    }

    /// What is to be done at a forkpoint; waits for it. `None`: nobody can want anything any more.
    pub fn at_forkpoint(&mut self) -> Option<Request> {
        loop {
            let request = self.waiting.pop_front().or_else(|| self.requests.recv().ok())?;
            // For a trim the guest has been too active since.
            if !matches!(request, Request::Trim { .. }) {
                return Some(request);
            }
        }
    }

    /// What the guest was interrupted for, if that is not done yet. At a rewind saves that wait for a forkpoint are given up, and
    /// their directories closed.
    pub fn urgent(&mut self) -> Option<Request> {
        self.waiting.extend(self.requests.try_iter());
        let is_rewind = |request: &Request| matches!(request, Request::Rewind { .. });
        let is_trim = |request: &Request| matches!(request, Request::Trim { .. });
        let rewind = self.waiting.iter().position(is_rewind);
        let at = rewind.or_else(|| self.waiting.iter().position(is_trim))?;
        let urgent = self.waiting.remove(at);
        if rewind.is_some() {
            self.waiting.clear();
        }
        urgent
    }
}
