//! A running fork's side of its control socket.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, mpsc::Sender},
};

use crate::{
    channel::Channel,
    devices::Devices,
    machine::{ConsoleReader, Observer, Source},
    protocol::{FromFork, Stamps, ToFork},
};

/// A request to save the machine at its next forkpoint.
pub struct SaveRequest {
    /// Mailbox with which the saved machine goes on.
    pub mailbox: Vec<u8>,
    /// Empty snapshot directory.
    pub directory: OwnedFd,
}

/// Serves the control socket in the event loop.
pub struct Control {
    channel: Arc<Channel>,
    saves: Sender<SaveRequest>,
    console: ConsoleReader,
}

impl Control {
    /// Save requests go to `saves`, whose receiver is the lead vCPU's thread.
    pub fn new(channel: Arc<Channel>, saves: Sender<SaveRequest>) -> Self {
        Self { channel, saves, console: ConsoleReader::default() }
    }
}

impl Source for Control {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    fn ready(&mut self, devices: &Devices) {
        loop {
            match self.channel.try_receive() {
                Ok(Some((ToFork::Connect { port }, fds))) => {
                    for stream in fds {
                        if let Err(error) = devices.connect(port, stream) {
                            // The stream is closed, which is what its other side waits for.
                            tracing::debug!(port, %error, "vsock connection refused");
                        }
                    }
                }
                Ok(Some((ToFork::Save { mailbox }, fds))) => {
                    for directory in fds {
                        // The receiver lives as long as the process.
                        let _ = self.saves.send(SaveRequest { mailbox: mailbox.clone(), directory });
                    }
                }
                Err(crate::channel::Error::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    return;
                }
                // The daemon is gone or of another build: nobody can use this fork any more.
                Ok(None | Some((ToFork::Activate { .. }, _))) | Err(_) => std::process::exit(1),
            }
        }
    }

    fn after_round(&mut self, devices: &Devices) {
        while let Some(text) = self.console.read(devices) {
            // A daemon that does not keep up loses console text, never the fork.
            let _ = self.channel.try_send(&FromFork::Console(text));
        }
    }
}

/// Passes the acknowledgement on, straight from the vCPU's thread.
pub struct Acknowledge {
    channel: Arc<Channel>,
    stamps: std::sync::Mutex<Stamps>,
}

impl Acknowledge {
    /// `stamps` are those reached until the guest is entered.
    pub fn new(channel: Arc<Channel>, stamps: Stamps) -> Self {
        Self { channel, stamps: std::sync::Mutex::new(stamps) }
    }
}

impl Observer for Acknowledge {
    fn acknowledged(&self, generation: u64, nonce: u64) {
        let mut stamps = self.stamps.lock().expect("no holder panics");
        stamps.acknowledged = crate::clock::monotonic_ns();
        if self.channel.send(&FromFork::Acknowledged { generation, nonce, stamps: *stamps }, &[]).is_err() {
            std::process::exit(1);
        }
    }
}
