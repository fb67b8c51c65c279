//! Requests and answers of exec.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ErrorBody;

/// A command to run in a fork.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Added to its environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Working directory; `/` if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// User name or number; root if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Standard input as text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// Standard input as base64; not beside `stdin`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin_base64: Option<String>,
    /// Kill it after so many milliseconds; never if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// A further line of a streamed exec request; one field of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecInput {
    /// Standard input as text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// Standard input as base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin_base64: Option<String>,
    /// A signal for the command's process group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<u8>,
}

/// How a command ended; one of the first three is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExecEnd {
    /// Its exit status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// The signal that killed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// Whether it was killed because its time was over.
    #[serde(default)]
    pub timed_out: bool,
}

/// How long an exec took, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExecTimings {
    /// Until the agent was connected; near 0 on a kept connection.
    pub connect: f64,
    /// Until the command was started.
    pub started: f64,
    /// From the request to the end.
    pub total: f64,
}

/// The answer to an exec.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ExecAnswer {
    /// Standard output as UTF-8, lossy.
    pub stdout: String,
    /// Standard error as UTF-8, lossy.
    pub stderr: String,
    /// The exact bytes, when they are not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdout_base64: Option<String>,
    /// The exact bytes, when they are not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stderr_base64: Option<String>,
    /// Whether output beyond 10 MiB was dropped.
    pub stdout_truncated: bool,
    /// Whether output beyond 10 MiB was dropped.
    pub stderr_truncated: bool,
    /// How it ended.
    #[serde(flatten)]
    pub end: ExecEnd,
    /// How long it took.
    pub timings_us: ExecTimings,
}

/// A line of a streamed answer to an exec.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum ExecEvent {
    /// The command runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// Standard output.
    Stdout(Output),
    /// Standard error.
    Stderr(Output),
    /// The command ended; the last line.
    Exit(ExecEnd),
    /// The call failed; the last line.
    Error {
        /// Why.
        error: ErrorBody,
    },
}

/// Bytes of an output stream: text when they are UTF-8, else base64.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct Output {
    /// As text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// As base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base64: Option<String>,
}

impl Output {
    /// Of raw bytes.
    pub fn new(bytes: &[u8]) -> Self {
        match std::str::from_utf8(bytes) {
            Ok(text) => Self { text: Some(text.to_owned()), base64: None },
            Err(_) => Self { text: None, base64: Some(STANDARD.encode(bytes)) },
        }
    }

    /// The raw bytes.
    pub fn bytes(&self) -> Vec<u8> {
        match (&self.text, &self.base64) {
            (Some(text), _) => text.clone().into_bytes(),
            (None, Some(encoded)) => STANDARD.decode(encoded).unwrap_or_default(),
            (None, None) => Vec::new(),
        }
    }
}

/// Standard input of a request; `Err` says what is wrong with it.
pub fn input_bytes(text: Option<String>, base64: Option<String>) -> Result<Option<Vec<u8>>, String> {
    match (text, base64) {
        (Some(_), Some(_)) => Err("stdin and stdin_base64 are both set; set one".to_owned()),
        (Some(text), None) => Ok(Some(text.into_bytes())),
        (None, Some(encoded)) => {
            STANDARD.decode(encoded).map(Some).map_err(|error| format!("stdin_base64 is not base64: {error}"))
        }
        (None, None) => Ok(None),
    }
}

/// Text of output bytes, and the bytes in base64 when the text is not exact.
pub fn output_text(bytes: Vec<u8>) -> (String, Option<String>) {
    match String::from_utf8(bytes) {
        Ok(text) => (text, None),
        Err(error) => {
            let bytes = error.into_bytes();
            (String::from_utf8_lossy(&bytes).into_owned(), Some(STANDARD.encode(&bytes)))
        }
    }
}
