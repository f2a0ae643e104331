//! The terminal on standard input: raw while a guest has it, and put right again whatever happens.

use rustix::termios::{self, LocalModes, OptionalActions, OutputModes, Termios};
use std::io::IsTerminal;
use std::sync::Mutex;

static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Puts the terminal on standard input into raw mode; with `keep_signals` Ctrl-C and its like still send signals. Nothing happens when
/// standard input is no terminal. [`restore`] undoes it.
pub fn raw(keep_signals: bool) {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return;
    }
    let Ok(before) = termios::tcgetattr(&stdin) else { return };
    let mut t = before.clone();
    t.make_raw();
    // Output keeps its newline handling, so that messages of our own stay readable.
    t.output_modes |= OutputModes::OPOST | OutputModes::ONLCR;
    if keep_signals {
        t.local_modes |= LocalModes::ISIG;
    }
    if termios::tcsetattr(&stdin, OptionalActions::Now, &t).is_ok() {
        let mut saved = SAVED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        saved.get_or_insert(before);
    }
}

/// Puts the terminal back as it was before the first [`raw`].
pub fn restore() {
    let saved = SAVED.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
    if let Some(t) = saved {
        // Nothing can be done about a terminal that went away.
        let _ = termios::tcsetattr(std::io::stdin(), OptionalActions::Now, &t);
    }
}

/// Restores the terminal when dropped.
pub struct Guard;

impl Drop for Guard {
    fn drop(&mut self) {
        restore();
    }
}
