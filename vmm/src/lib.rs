//! The virtual machine monitor: boots a template's guest, captures it, and serves forks of it.
//!
//! Principles:
//! 1. A fork of a VM is a fork of the process that holds it; the kernel does all copy-on-write.
//! 2. Nothing that could have been done before a request is done after it.
//! 3. State is typed, complete by construction, and untrusted when it is read back.
//! 4. Guest memory is never a Rust reference; every number from the guest is checked.
//! 5. `unsafe` lives in [`sys`] only.
//!
//! Arrows: `sys` <- `memory` <- {`vm`, `vcpu`, `devices`, `boot`} <- `snapshot` <- `machine` <- `zygote`.

use std::{cell::Cell, panic};

thread_local! {
    /// A panic of this thread is expected and handled.
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// Makes every panic the end of the process, in whichever thread: a fork or daemon that lost a thread would hang those
/// who wait for it. (Not by the profile's `panic = "abort"`, for which tests would need a second build of everything.)
/// Those within [`contain_panic`] are spared.
pub fn abort_on_panic() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        if CONTAINED.get() {
            return;
        }
        report(panic);
        std::process::abort();
    }));
}

/// Does work on a stranger's bytes with code that is not ours; `None` if it panics, of which nobody else hears. The work
/// must leave nothing half done where others see it, as [`panic::UnwindSafe`] tells.
pub fn contain_panic<T>(work: impl FnOnce() -> T + panic::UnwindSafe) -> Option<T> {
    let outer = CONTAINED.replace(true);
    let result = panic::catch_unwind(work);
    CONTAINED.set(outer);
    result.ok()
}

pub mod arena;
pub mod boot;
pub mod builder;
pub mod channel;
pub mod clock;
pub mod devices;
pub mod host;
pub mod machine;
pub mod memory;
pub mod protocol;
pub mod snapshot;
pub mod sys;
pub mod vcpu;
pub mod vm;
pub mod zygote;
