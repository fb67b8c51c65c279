//! The end of a guest that is of no use.

use std::error::Error;
use std::time::Duration;

use rustix::system::RebootCommand;

use crate::console;
use crate::sys::hypercall::Port;

/// Tells console and host why this guest is of no use, and stops it. PID 1 must never simply exit.
pub fn give_up(message: &str) -> ! {
    console::say(message);
    match Port::open() {
        Ok(port) => port.fail(message),
        Err(error) => console::say(&format!("cannot tell the host: {error}")),
    }
    // The host normally ends the VM inside the hypercall.
    loop {
        let _ = rustix::system::reboot(RebootCommand::Restart);
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// An error and its causes as one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests;
