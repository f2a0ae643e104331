//! Termination signals, taken by a thread instead of a handler, so that the program can put the terminal right and say what happened.

use std::mem::MaybeUninit;

/// A signal that asks the program to end or to report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGINT: Ctrl-C.
    Interrupt,
    /// SIGTERM.
    Terminate,
    /// SIGHUP: the terminal went away.
    HangUp,
    /// SIGQUIT: a report on demand.
    Quit,
}

impl Signal {
    /// Its number.
    pub fn number(self) -> i32 {
        match self {
            Signal::Interrupt => libc::SIGINT,
            Signal::Terminate => libc::SIGTERM,
            Signal::HangUp => libc::SIGHUP,
            Signal::Quit => libc::SIGQUIT,
        }
    }
    /// The exit code of a program that ends by it: 128 and its number.
    pub fn exit_code(self) -> i32 {
        128 + self.number()
    }
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Signal::Interrupt => "SIGINT",
            Signal::Terminate => "SIGTERM",
            Signal::HangUp => "SIGHUP",
            Signal::Quit => "SIGQUIT",
        }
    }
}

const ALL: [Signal; 4] = [Signal::Interrupt, Signal::Terminate, Signal::HangUp, Signal::Quit];

fn set() -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initializes the set it is given; sigaddset gets an initialized set and valid signal numbers.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for s in ALL {
            libc::sigaddset(set.as_mut_ptr(), s.number());
        }
        set.assume_init()
    }
}

/// Blocks the termination signals in the calling thread and all that it starts from now on: call it first in `main`. SIGPIPE is
/// ignored, so that a closed pipe is an error of the write.
pub fn block() {
    let set = set();
    // SAFETY: the set is initialized; no old mask is asked for. SIG_IGN is a valid disposition for SIGPIPE.
    unsafe {
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
    }
}

/// Undoes [`block`] in the calling thread: for child processes started from it.
pub fn unblock() {
    let set = set();
    // SAFETY: the set is initialized; no old mask is asked for.
    unsafe {
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
    }
}

/// Starts a thread that calls `f` for each termination signal.
///
/// # Errors
/// The thread can't be started.
pub fn on_signal(mut f: impl FnMut(Signal) + Send + 'static) -> std::io::Result<()> {
    let set = set();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        loop {
            let mut number = 0;
            // SAFETY: the set is initialized and `number` is a valid place for the result.
            if unsafe { libc::sigwait(&set, &mut number) } != 0 {
                return;
            }
            if let Some(s) = ALL.into_iter().find(|s| s.number() == number) {
                f(s);
            }
        }
    })?;
    Ok(())
}
