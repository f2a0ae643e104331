//! Getting a vCPU out of the kernel: the doorbell, and the gate that holds all vCPUs out while memory slots change.
//!
//! # The doorbell's protocol
//!
//! Who wants something says what (a bit in [`Signals`](hyaline_x86::env::Signals), or `stop`), then sets `immediate_exit` in the run
//! page, then sends a real-time signal to the vCPU's thread if it is in [`run`](crate::KvmVcpu::run). The vCPU's thread clears
//! `immediate_exit`, then looks at what is wanted, then calls the kernel. So a wish that comes after the look finds the flag
//! cleared before and sets it: the kernel returns at once, or is interrupted by the signal if it had already looked at the flag.

use crate::error::KvmError;
use kvm_bindings::kvm_run;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, Weak};

/// The page (or pages) that a vCPU shares with the kernel.
#[derive(Debug)]
pub(crate) struct RunPage {
    start: NonNull<kvm_run>,
    len: usize,
}

// SAFETY: the mapping belongs to this value and lives as long as it. All fields but `immediate_exit` are only touched by who owns the
// vCPU (`KvmVcpu`, `&mut self`), and `immediate_exit` only as an atomic.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    pub(crate) fn map(vcpu: BorrowedFd<'_>, len: usize) -> Result<RunPage, KvmError> {
        if len < size_of::<kvm_run>() {
            return Err(KvmError::Unsuitable(format!(
                "the kernel says that a vCPU's run page has {len} bytes; it must have at least {}",
                size_of::<kvm_run>()
            )));
        }
        // SAFETY: a new mapping at a place of the kernel's choice; nothing of ours is there.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(start) {
            Some(start) if start.as_ptr() != libc::MAP_FAILED => Ok(RunPage { start: start.cast(), len }),
            _ => Err(KvmError::call("mmap", "a vCPU's run page", std::io::Error::last_os_error())),
        }
    }

    /// The run structure. Dereference fields one by one, never as a whole, since `immediate_exit` belongs to other threads too.
    pub(crate) fn get(&self) -> *mut kvm_run {
        self.start.as_ptr()
    }

    /// Copies bytes out of the page; false when they aren't inside.
    pub(crate) fn read(&self, offset: usize, out: &mut [u8]) -> bool {
        if offset.checked_add(out.len()).is_none_or(|end| end > self.len) {
            return false;
        }
        // SAFETY: inside of the mapping by the check; the kernel writes there only during KVM_RUN, which the owner isn't in.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.start.as_ptr().cast::<u8>().add(offset),
                out.as_mut_ptr(),
                out.len(),
            );
        }
        true
    }

    /// Copies bytes into the page; false when they aren't inside.
    pub(crate) fn write(&self, offset: usize, data: &[u8]) -> bool {
        if offset.checked_add(data.len()).is_none_or(|end| end > self.len) {
            return false;
        }
        // SAFETY: as in `read`.
        unsafe {
            std::ptr::copy_nonoverlapping(
                data.as_ptr(),
                self.start.as_ptr().cast::<u8>().add(offset),
                data.len(),
            );
        }
        true
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the field is inside of the mapping, lives as long as `self`, and is accessed as an atomic by all of this process.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.start.as_ptr()).immediate_exit) }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: mapped by us with this length, and nobody has a pointer into it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// What other threads may touch of a vCPU.
#[derive(Debug)]
pub(crate) struct Kicker {
    pub(crate) page: RunPage,
    /// The kernel's number of the thread that is in `run`; 0: none.
    thread: AtomicI32,
    /// Somebody wants `run` to return.
    stop: AtomicBool,
    /// The thread is in the kernel, or about to be.
    inside: AtomicBool,
}

impl Kicker {
    pub(crate) fn new(page: RunPage) -> Kicker {
        Kicker {
            page,
            thread: AtomicI32::new(0),
            stop: AtomicBool::new(false),
            inside: AtomicBool::new(false),
        }
    }

    /// Makes the vCPU's thread look at its signals.
    pub(crate) fn notify(&self) {
        self.page.immediate_exit().store(1, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: no memory is passed. If the thread has ended meanwhile, another thread of this process may get the signal,
            // whose handler does nothing and which restarts system calls.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, kick_signal()) };
        }
    }

    /// Clears the doorbell: before looking at what is wanted.
    pub(crate) fn clear(&self) {
        self.page.immediate_exit().store(0, Ordering::SeqCst);
    }

    /// Has the kernel return as soon as it has completed the last exit's access.
    pub(crate) fn ring_own(&self) {
        self.page.immediate_exit().store(1, Ordering::SeqCst);
    }

    pub(crate) fn take_stop(&self) -> bool {
        self.stop.load(Ordering::SeqCst) && self.stop.swap(false, Ordering::SeqCst)
    }

    pub(crate) fn stop_wanted(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Marks the calling thread as the vCPU's until the guard drops.
    pub(crate) fn bind(self: &Arc<Kicker>) -> Bound {
        let signal = kick_signal();
        // SAFETY: plain calls on the calling thread's own signal mask, with a set on our stack.
        let thread = unsafe {
            let mut set = std::mem::zeroed::<libc::sigset_t>();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, signal);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
            libc::syscall(libc::SYS_gettid) as i32
        };
        self.thread.store(thread, Ordering::SeqCst);
        Bound(self.clone())
    }
}

/// See [`Kicker::bind`].
pub(crate) struct Bound(Arc<Kicker>);

impl Drop for Bound {
    fn drop(&mut self) {
        self.0.thread.store(0, Ordering::SeqCst);
    }
}

/// The signal that interrupts KVM_RUN: the first real-time signal that nobody handles, with a handler that does nothing.
fn kick_signal() -> i32 {
    static SIGNAL: OnceLock<i32> = OnceLock::new();
    extern "C" fn nothing(_: i32) {}
    *SIGNAL.get_or_init(|| {
        let (first, last) = (libc::SIGRTMIN(), libc::SIGRTMAX());
        for signal in first..=last {
            // SAFETY: the structures are on our stack and initialized; the handler is async-signal-safe as it does nothing.
            unsafe {
                let mut old = std::mem::zeroed::<libc::sigaction>();
                if libc::sigaction(signal, std::ptr::null(), &mut old) != 0
                    || old.sa_sigaction != libc::SIG_DFL
                {
                    continue;
                }
                let mut new = std::mem::zeroed::<libc::sigaction>();
                new.sa_sigaction = nothing as extern "C" fn(i32) as usize;
                new.sa_flags = libc::SA_RESTART;
                if libc::sigaction(signal, &new, std::ptr::null_mut()) == 0 {
                    return signal;
                }
            }
        }
        // All taken: somebody's handler gets ours too, which is still better than SIG_DFL, which would end the process.
        first
    })
}

/// Interrupts one vCPU from any thread. Outlives the vCPU harmlessly. Cheap to clone.
#[derive(Clone, Debug)]
pub struct KickHandle(pub(crate) Arc<Kicker>);

impl KickHandle {
    /// Makes `run` return [`Exit::Kicked`](crate::Exit::Kicked) as soon as the instruction in hand is complete; if the vCPU isn't in
    /// `run`, its next `run` returns at once.
    pub fn kick(&self) {
        self.0.stop.store(true, Ordering::SeqCst);
        self.0.notify();
    }

    /// Makes the vCPU look at its [`Signals`](hyaline_x86::env::Signals) word: call after raising a bit in it.
    pub fn notify(&self) {
        self.0.notify();
    }

    /// Takes back a [`KickHandle::kick`] that wasn't taken up yet.
    pub fn cancel(&self) {
        self.0.stop.store(false, Ordering::SeqCst);
    }
}

/// Holds the vCPUs out of the kernel while memory slots are being replaced, which the kernel can't do in one step.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    closed: AtomicBool,
    lock: Mutex<()>,
    changed: Condvar,
    vcpus: Mutex<Vec<Weak<Kicker>>>,
}

impl Gate {
    pub(crate) fn add(&self, vcpu: &Arc<Kicker>) {
        let mut vcpus = self.vcpus.lock().unwrap_or_else(PoisonError::into_inner);
        vcpus.retain(|v| v.strong_count() > 0);
        vcpus.push(Arc::downgrade(vcpu));
    }

    /// Before KVM_RUN.
    pub(crate) fn enter(&self, vcpu: &Kicker) {
        loop {
            vcpu.inside.store(true, Ordering::SeqCst);
            if !self.closed.load(Ordering::SeqCst) {
                return;
            }
            self.leave(vcpu);
            let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            while self.closed.load(Ordering::SeqCst) {
                guard = self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// After KVM_RUN.
    pub(crate) fn leave(&self, vcpu: &Kicker) {
        vcpu.inside.store(false, Ordering::SeqCst);
        if self.closed.load(Ordering::SeqCst) {
            let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.changed.notify_all();
        }
    }

    /// Closes the gate and waits until no vCPU is inside, does `work`, opens the gate. A thread that is inside of `run` may call
    /// this from an access it handles: it isn't in the kernel then.
    pub(crate) fn with_closed<T>(&self, work: impl FnOnce() -> T) -> T {
        let vcpus: Vec<_> = {
            let vcpus = self.vcpus.lock().unwrap_or_else(PoisonError::into_inner);
            vcpus.iter().filter_map(Weak::upgrade).collect()
        };
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while self.closed.load(Ordering::SeqCst) {
            guard = self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.closed.store(true, Ordering::SeqCst);
        for vcpu in &vcpus {
            if vcpu.inside.load(Ordering::SeqCst) {
                vcpu.notify();
            }
            while vcpu.inside.load(Ordering::SeqCst) {
                guard = self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
            }
        }
        drop(guard);
        let result = work();
        let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.closed.store(false, Ordering::SeqCst);
        self.changed.notify_all();
        result
    }
}
