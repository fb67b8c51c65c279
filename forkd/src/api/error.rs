//! Typed errors of the API, and the catalogue that gives each code its HTTP status, kind and remedy.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Whose fault an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The caller's: the same request will fail again.
    Request,
    /// This host's or this software's.
    Infra,
    /// The guest's.
    Guest,
}

/// An error as the API shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// Stable, for programs.
    #[schema(example = "template_not_found")]
    pub code: String,
    /// What happened, to what.
    pub message: String,
    /// Why, where more is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// What to do about it.
    pub remediation: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// Whose fault it is.
    pub kind: Kind,
    /// When to try again, in seconds, where that depends on others; the `Retry-After` of an answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_s: Option<u32>,
}

/// How errors lie in answers.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ErrorAnswer {
    /// The error.
    pub error: ErrorBody,
}

/// An error on its way to a caller.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// Which.
    pub code: Code,
    /// What happened, to what.
    pub message: String,
    /// Why, where more is known.
    pub cause: Option<String>,
    /// See [`ErrorBody::retry_after_s`].
    pub retry_after_s: Option<u32>,
}

/// A row of the catalogue.
struct Entry {
    name: &'static str,
    status: u16,
    kind: Kind,
    retryable: bool,
    remediation: &'static str,
}

macro_rules! catalogue {
    ($($(#[$doc:meta])* $variant:ident = $name:literal $status:literal $kind:ident $retry:literal $remedy:literal;)*) => {
        /// What can go wrong.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Code { $($(#[$doc])* $variant,)* }

        impl Code {
            /// All codes.
            pub const ALL: &[Code] = &[$(Code::$variant,)*];

            fn entry(self) -> Entry {
                match self {
                    $(Code::$variant => Entry {
                        name: $name, status: $status, kind: Kind::$kind, retryable: $retry, remediation: $remedy,
                    },)*
                }
            }
        }
    };
}

catalogue! {
    /// The body, a header or a parameter is not what the verb takes.
    InvalidRequest = "invalid_request" 400 Request false
        "correct the field that the message names; the schema is at /v1/openapi.json";
    /// A name or id does not have the form of one.
    InvalidName = "invalid_name" 400 Request false
        "use 1 to 63 of a-z, 0-9, '.', '_', '-', beginning with a letter or digit, without '..'";
    /// `count` is out of range.
    InvalidCount = "invalid_count" 400 Request false "ask for 1 to 1000 forks in one request";
    /// A rule of an egress policy is malformed.
    InvalidRule = "invalid_rule" 400 Request false
        "write [tcp://|udp://|icmp://]DESTINATION[:PORTS], for instance example.com:443 or 192.0.2.0/24";
    /// The template has no NIC.
    NoNetwork = "no_network" 400 Request false
        "leave out the network, or build the template with a NIC";
    /// An address is outside of the daemon's range, or asked for several forks.
    InvalidAddress = "invalid_address" 400 Request false
        "choose an address in the daemon's --network-range for one fork, or leave it out";
    /// Another fork has the address, or all are taken.
    AddressTaken = "address_taken" 409 Request true "choose another address, or end the fork that has it";
    /// The net process cannot be had.
    NetworkUnavailable = "network_unavailable" 503 Infra true "look at the daemon's log, and try again";
    /// The daemon's taps cannot carry out a rule.
    NamesUnsupported = "names_unsupported" 400 Request false
        "give addresses and CIDRs instead of domain names, or start the daemon with --network user";
    /// All taps are taken.
    TapsExhausted = "taps_exhausted" 429 Infra true "end some forks, or start the daemon with more --taps";
    /// Nothing is served at this path.
    NoSuchRoute = "no_such_route" 404 Request false "look up the paths at /v1/openapi.json";
    /// The path is served, by other methods.
    MethodNotAllowed = "method_not_allowed" 405 Request false "look up the path's methods at /v1/openapi.json";
    /// The body is too long.
    BodyTooLarge = "body_too_large" 413 Request false
        "send less; long standard input goes by the streaming form of exec (Content-Type: application/x-ndjson)";
    /// An idempotency key came again with another request.
    IdempotencyConflict = "idempotency_conflict" 422 Request false "use a new Idempotency-Key for a new request";
    /// No such template.
    TemplateNotFound = "template_not_found" 404 Request false
        "list the templates with 'forkling template ls'; build one with 'forkling template build'";
    /// The template's name is taken.
    TemplateExists = "template_exists" 409 Request false
        "choose another name, or remove the template with 'forkling template rm'";
    /// The template has forks.
    TemplateInUse = "template_in_use" 409 Request true
        "kill the forks that the message names ('forkling kill --template NAME'), then try again";
    /// The template's zygote is gone or could not load it.
    TemplateBroken = "template_broken" 409 Infra false
        "bring it back with 'forkling template reload NAME'; if that fails, build it anew";
    /// The snapshot is damaged, of another format, or made for another CPU.
    SnapshotInvalid = "snapshot_invalid" 409 Infra false
        "build the template anew on this host; for use on several hosts give it a portable cpu (x86-64-v2, x86-64-v3)";
    /// A file of the build spec is missing or unreadable.
    FileNotFound = "file_not_found" 400 Request false "give an absolute path that the daemon's user may read";
    /// No kernel was given and there is no default.
    KernelMissing = "kernel_missing" 400 Request false
        "give a kernel (ELF vmlinux or bzImage), or start the daemon with FORKLING_KERNEL set";
    /// The root is neither a directory nor an archive nor an image.
    RootNotArchive = "root_not_archive" 400 Request false
        "give a directory, a tar (plain, gzip, xz or zstd), an EROFS image, or \"debian\"";
    /// The memory is outside what the machine can have.
    MemoryOutOfRange = "memory_out_of_range" 400 Request false "ask for 64 to 65536 MiB";
    /// The host has not so much memory.
    MemoryExceedsHost = "memory_exceeds_host" 400 Request true
        "ask for less memory, or free some on the host";
    /// The builder refused what it was asked to build.
    BuildRefused = "build_refused" 400 Request false "correct the build spec as the message says";
    /// The guest did not reach its ready condition.
    BuildGuestFailed = "build_guest_failed" 422 Guest false
        "read the guest's console in the build's events; correct the command or raise ready_timeout";
    /// The host could not build.
    BuildFailed = "build_failed" 500 Infra true "see the cause; 'forkling doctor' checks what builds need";
    /// A tool that makes root images is not installed or failed.
    ToolFailed = "tool_failed" 500 Infra false
        "install what the message names (Debian: apt install erofs-utils mmdebstrap tar uidmap) and read its output";
    /// Too many builds at once.
    TooManyBuilds = "too_many_builds" 429 Infra true "wait for a running build to end";
    /// No such fork, or its record was dropped.
    ForkNotFound = "fork_not_found" 404 Request false "list the forks with 'forkling ps'";
    /// A living fork has this name.
    ForkExists = "fork_exists" 409 Request false "choose another name, or kill the fork that has it";
    /// The fork's process is gone.
    ForkDied = "fork_died" 410 Guest false
        "make a new fork; the message has the reason, 'forkling inspect ID' has the console's last lines";
    /// The fork was not made in time.
    ForkTimeout = "fork_timeout" 504 Guest true
        "raise timeout_ms; if hooks on fork are slow, make them faster or run them at build time";
    /// The fork could not be made.
    ForkFailed = "fork_failed" 500 Infra true "see the cause; 'forkling doctor' checks what forks need";
    /// The guest failed before it acknowledged.
    ForkGuestFailed = "fork_guest_failed" 502 Guest false
        "see the cause; the template's hooks on fork, or its guest, failed";
    /// As many forks as the limits of the process allow are alive.
    TooManyForks = "too_many_forks" 429 Infra true
        "kill forks that are not needed, or raise the daemon's limit of open files (LimitNOFILE)";
    /// Cores, memory or processes of the host are used up.
    HostFull = "host_full" 429 Infra true
        "try again after the time given (Retry-After); the message names the limit, and how it is raised";
    /// The kernel does not show where a fork's memory is.
    MeasureFailed = "measure_failed" 500 Infra false
        "run forkd as root or as the user of its forks: it must be allowed to read /proc/PID/smaps and pagemap";
    /// The environment is too long for a mailbox.
    EnvironmentTooLarge = "environment_too_large" 400 Request false
        "shorten env to 12 KiB in all, or send the data by exec's standard input";
    /// The command was not found in the guest.
    CommandNotFound = "command_not_found" 422 Guest false
        "give the path of an executable in the guest, or install it in the template";
    /// The working directory does not exist in the guest.
    DirectoryNotFound = "directory_not_found" 422 Guest false "give a directory that exists in the guest";
    /// The user does not exist in the guest.
    UserNotFound = "user_not_found" 422 Guest false "give a user of the guest's /etc/passwd, or a number";
    /// The guest's kernel refused.
    GuestRefused = "guest_refused" 422 Guest false "see the message of the guest's kernel";
    /// The agent does not answer.
    AgentUnreachable = "agent_unreachable" 502 Guest true
        "try again; if it stays, kill the fork: its guest is stuck or its agent is gone";
    /// The guest has no agent (null payload).
    NoAgent = "no_agent" 409 Request false "use a template with payload \"linux\"";
    /// A port number that is none.
    InvalidPort = "invalid_port" 400 Request false "give a port from 1 to 65535";
    /// Forwarded ports are for this host only.
    AddressNotLoopback = "address_not_loopback" 400 Request false
        "give an address of the loopback, such as 127.0.0.1:0 or [::1]:8080; for others put a proxy of your own in front";
    /// Somebody listens there.
    AddressInUse = "address_in_use" 409 Request true
        "choose another port or name, or port 0 for any that is free; 'GET /v1/forks/{id}/ports' lists the fork's own";
    /// The kernel does not let the daemon listen there.
    AddressUnavailable = "address_unavailable" 400 Request false
        "see the cause; ports below 1024 need privilege, [::1] needs IPv6 on this host";
    /// The path of a socket would be too long.
    PathTooLong = "path_too_long" 500 Infra false "start forkd with a shorter --runtime-dir";
    /// A fork has as many forwarded ports as it may have.
    TooManyPorts = "too_many_ports" 409 Request true
        "remove some of the fork's ports (DELETE /v1/forks/{id}/ports/{port})";
    /// No such forwarded port.
    PortNotFound = "port_not_found" 404 Request false "list the fork's ports with GET /v1/forks/{id}/ports";
    /// Nobody listens on the port in the guest.
    GuestPortClosed = "guest_port_closed" 502 Guest true
        "start the server in the guest, on 127.0.0.1, ::1 or all addresses, and try again";
    /// A tunnel was asked for without its headers.
    UpgradeRequired = "upgrade_required" 426 Request false
        "send the headers 'Connection: Upgrade' and 'Upgrade: forkling-tunnel', over HTTP/1.1";
    /// The fork's vsock socket was not asked for.
    VsockNotOpen = "vsock_not_open" 404 Request false
        "open it with POST /v1/forks/{id}/vsock ('forkling vsock ID')";
    /// A socket or its directory could not be made.
    SocketFailed = "socket_failed" 500 Infra true
        "see the cause; the daemon must be allowed to write its --runtime-dir";
    /// The fork could not be saved.
    SnapshotFailed = "snapshot_failed" 500 Infra true "see the cause; check the free space of the state directory";
    /// The daemon is ending.
    ShuttingDown = "shutting_down" 503 Infra true "try again when the daemon is back";
    /// The daemon failed; a defect.
    Internal = "internal" 500 Infra false "report this with the daemon's log";
}

impl Code {
    /// The stable name.
    pub fn name(self) -> &'static str {
        self.entry().name
    }
}

impl Error {
    /// An error without a cause.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), cause: None, retry_after_s: None }
    }

    /// With the reason behind it, with all its sources.
    #[must_use]
    pub fn because(mut self, cause: impl std::fmt::Display) -> Self {
        self.cause = Some(cause.to_string());
        self
    }

    /// With the seconds after which the same request may succeed.
    #[must_use]
    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after_s = Some(seconds);
        self
    }

    /// As the API shows it.
    pub fn body(&self) -> ErrorBody {
        let entry = self.code.entry();
        ErrorBody {
            code: entry.name.to_owned(),
            message: self.message.clone(),
            cause: self.cause.clone(),
            remediation: entry.remediation.to_owned(),
            retryable: entry.retryable,
            kind: entry.kind,
            retry_after_s: self.retry_after_s,
        }
    }

    /// HTTP status.
    pub fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.code.entry().status).expect("the catalogue has valid statuses")
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let status = self.status();
        let mut response = (status, Json(ErrorAnswer { error: self.body() })).into_response();
        if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(self.retry_after_s.unwrap_or(1)));
        }
        response
    }
}

/// An error and all its sources in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        source = inner.source();
    }
    text
}

#[cfg(test)]
mod tests;
