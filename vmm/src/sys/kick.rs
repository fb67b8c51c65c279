//! Kicking a vCPU thread out of KVM_RUN.
//!
//! A signal alone can arrive just before KVM_RUN and be lost. Its handler therefore sets `immediate_exit` in the
//! thread's own `kvm_run` page, so that a KVM_RUN that begins after the signal returns at once with EINTR
//! (Documentation/virt/kvm/api.rst, section 5).

use std::{
    cell::Cell,
    io, ptr,
    sync::{
        Once,
        atomic::{AtomicU8, Ordering},
    },
};

use kvm_ioctls::VcpuFd;

thread_local! {
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
}

/// Names a thread that runs a vCPU. The thread must exist while it is kicked; its owner joins it afterwards.
#[derive(Clone, Copy, Debug)]
pub struct KickHandle {
    process: i32,
    thread: i32,
}

fn signal_number() -> i32 {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_: i32) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: non-null only while the thread runs its vCPU (`Kickable`), whose `kvm_run` page is mapped.
        let flag = unsafe { &*flag };
        flag.store(1, Ordering::Relaxed);
    }
}

fn install_handler() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: all-zero bytes are a valid sigaction.
        let action = unsafe { action.assume_init_mut() };
        action.sa_sigaction = on_kick as extern "C" fn(i32) as usize;
        // SAFETY: `action` is valid and the handler only does async-signal-safe work.
        let result = unsafe { libc::sigaction(signal_number(), action, ptr::null_mut()) };
        assert_eq!(result, 0, "SIGRTMIN can be handled");
    });
}

/// While it lives, kicks of this thread end KVM_RUN of the given vCPU.
pub struct Kickable(());

impl Kickable {
    /// Makes the calling thread kickable for `vcpu`, which it must run itself and not drop before this value.
    pub fn enter(vcpu: &mut VcpuFd) -> (Self, KickHandle) {
        let flag = ptr::from_mut(&mut vcpu.get_kvm_run().immediate_exit).cast::<AtomicU8>();
        IMMEDIATE_EXIT.set(flag);
        (Self(()), KickHandle::of_this_thread())
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null());
    }
}

impl KickHandle {
    /// Of the calling thread. Until it enters [`Kickable`] and after, a kick has no effect.
    pub fn of_this_thread() -> Self {
        install_handler();
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        Self { process: std::process::id() as i32, thread }
    }

    /// Makes the thread's current or next KVM_RUN return.
    pub fn kick(&self) -> io::Result<()> {
        // SAFETY: tgkill takes plain numbers; a wrong thread id gives ESRCH.
        let result = unsafe { libc::syscall(libc::SYS_tgkill, self.process, self.thread, signal_number()) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}
