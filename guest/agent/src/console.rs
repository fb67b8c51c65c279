//! Messages on the guest's console. Losing one must never stop the agent, so errors are ignored here.

use std::io::Write;

/// Writes a line with the agent's name in front.
pub fn say(message: &str) {
    let _ = writeln!(std::io::stderr(), "forkling-agent: {message}");
}

/// Writes a command's output as it is.
pub fn write(output: &[u8]) {
    let _ = std::io::stderr().write_all(output);
}
