//! What the command prints: tables for people, JSON for programs, errors with their remedy.

use std::{
    io::Write as _,
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::Serialize;

use super::{FAILED, NOT_FOUND, client::Failure};
use crate::api::{
    error::Code,
    types::{ErrorAnswer, ErrorBody},
};

/// How to print.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// JSON.
    pub json: bool,
}

impl Output {
    /// One line of JSON.
    pub fn print(self, value: &impl Serialize) {
        // A reader that went away is no reason to complain.
        let _ = writeln!(std::io::stdout(), "{}", serde_json::to_string(value).expect("answers are JSON"));
    }

    /// Prints a failure and says which status it gives.
    pub fn fail(self, failure: &Failure) -> ExitCode {
        let body = self.show(failure);
        ExitCode::from(if body.code == Code::CommandNotFound.name() { NOT_FOUND } else { FAILED })
    }

    /// Prints a failure.
    pub fn show(self, failure: &Failure) -> ErrorBody {
        let body = describe(failure);
        if self.json {
            self.print(&ErrorAnswer { error: body.clone() });
        } else {
            self.error(&body);
        }
        body
    }

    /// An error for people.
    pub fn error(self, body: &ErrorBody) {
        let cause = body.cause.as_ref().map(|cause| format!(": {cause}")).unwrap_or_default();
        let _ = writeln!(std::io::stderr(), "error: {}{cause}\n  hint: {}", body.message, body.remediation);
    }
}

fn describe(failure: &Failure) -> ErrorBody {
    let own = |code: &str, message: String, remediation: &str| ErrorBody {
        code: code.to_owned(),
        message,
        cause: None,
        remediation: remediation.to_owned(),
        retryable: false,
        kind: crate::api::types::Kind::Infra,
        retry_after_s: None,
    };
    match failure {
        Failure::Api(body) => (**body).clone(),
        Failure::Unreachable { socket, cause } => {
            let denied = cause.kind() == std::io::ErrorKind::PermissionDenied;
            let remedy = if denied {
                "the socket is for its owner and group; run as one of them"
            } else {
                "start forkd, or give its socket by --socket or FORKLING_SOCKET"
            };
            own("daemon_unreachable", format!("no daemon answers at {}: {cause}", socket.display()), remedy)
        }
        Failure::Broken(message) => own(
            "connection_broken",
            message.clone(),
            "see the daemon's log; program and daemon must be of one version",
        ),
        Failure::Local(message) => own("local", message.clone(), "see 'forkling --help'"),
    }
}

/// A table with aligned columns.
pub fn table(header: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        rows.iter().map(|row| row[column].chars().count()).chain([header[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let mut out = std::io::stdout().lock();
    let header: Vec<String> = header.iter().map(|&cell| cell.to_owned()).collect();
    for row in std::iter::once(&header).chain(rows) {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
        let _ = writeln!(out, "{}", cells.join("  ").trim_end());
    }
}

/// Bytes in MiB, for people.
pub fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Microseconds in milliseconds, for people.
pub fn ms(micros: f64) -> String {
    format!("{:.2} ms", micros / 1000.0)
}

/// How long ago a time in milliseconds since 1970 is, for people.
pub fn ago(unix_ms: u64) -> String {
    if unix_ms == 0 {
        return "-".to_owned();
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = now.saturating_sub(Duration::from_millis(unix_ms)).as_secs();
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}
