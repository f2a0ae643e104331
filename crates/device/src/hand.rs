//! What a device is doing right now, told to other threads and to crash reports; and the containment of panics.

use crate::Register;
use hyaline_space::{Actor, ExitKind, Origin};
use std::backtrace::Backtrace;
use std::cell::{Cell, RefCell};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// An access that a device has in hand.
#[derive(Clone, Copy, Debug)]
pub struct Handled {
    /// Who makes it.
    pub origin: Origin,
    /// Bank number.
    pub bank: usize,
    /// Offset in the bank.
    pub offset: u64,
    /// Bytes.
    pub size: u8,
    /// Is it a write?
    pub is_write: bool,
    /// What is written; 0 for reads.
    pub value: u64,
    /// The register.
    pub register: Option<&'static Register>,
}

/// A panic of a device, contained.
#[derive(Clone, Debug)]
pub struct Crash {
    /// The panic's message.
    pub message: String,
    /// Source file, line and column; empty unless [`contain_panics`] was called.
    pub location: String,
    /// Stack of the thread, innermost first; empty unless [`contain_panics`] was called.
    pub backtrace: Vec<String>,
    /// The access in hand; None when a timer, a line or the host was the cause.
    pub access: Option<Handled>,
    /// Virtual time in nanoseconds.
    pub time: u64,
}

/// A deliberate fault, to see what becomes of it: `-inject`.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Name of the register whose next access fails.
    pub register: String,
    /// How long the handler hangs; None: it panics.
    pub hang: Option<Duration>,
}

/// What the device works at, without a lock: written by the thread that holds the device, read by a watchdog.
#[derive(Default)]
pub(crate) struct Hand {
    /// Odd while the device is at work.
    turn: AtomicU64,
    /// Bank, size, direction, actor, exit; 0 when it isn't an access.
    what: AtomicU64,
    offset: AtomicU64,
    value: AtomicU64,
    rip: AtomicU64,
}

/// What an access asks for, without who asks.
#[derive(Clone, Copy)]
pub(crate) struct Doing {
    pub(crate) bank: usize,
    pub(crate) offset: u64,
    pub(crate) size: u8,
    pub(crate) is_write: bool,
    pub(crate) value: u64,
}

const ACCESS: u64 = 1 << 63;
const EXITS: [ExitKind; 4] = [ExitKind::PioIn, ExitKind::PioOut, ExitKind::MmioRead, ExitKind::MmioWrite];

impl Hand {
    /// The device's lock is held: nobody else writes.
    #[inline]
    pub(crate) fn enter(&self, origin: Option<&Origin>, doing: Option<&Doing>) {
        if let (Some(who), Some(d)) = (origin, doing) {
            let vcpu = match who.actor {
                Actor::Vcpu(n) => u64::from(n),
                _ => 0xff,
            };
            let exit = EXITS.iter().position(|e| *e == who.exit).unwrap_or(0) as u64;
            let what = ACCESS
                | (d.bank as u64 & 0xff)
                | u64::from(d.size) << 8
                | u64::from(d.is_write) << 16
                | exit << 17
                | vcpu << 24;
            self.what.store(what, Ordering::Relaxed);
            self.offset.store(d.offset, Ordering::Relaxed);
            self.value.store(d.value, Ordering::Relaxed);
            self.rip.store(who.rip, Ordering::Relaxed);
        } else {
            self.what.store(0, Ordering::Relaxed);
        }
        self.turn.store(self.turn.load(Ordering::Relaxed).wrapping_add(1), Ordering::Release);
    }
    #[inline]
    pub(crate) fn leave(&self) {
        self.turn.store(self.turn.load(Ordering::Relaxed).wrapping_add(1), Ordering::Release);
    }
    /// The turn in work, and its access.
    pub(crate) fn busy(&self) -> Option<(u64, Option<Handled>)> {
        let turn = self.turn.load(Ordering::Acquire);
        if turn & 1 == 0 {
            return None;
        }
        let what = self.what.load(Ordering::Relaxed);
        let access = (what & ACCESS != 0).then(|| {
            let exit = EXITS.get((what >> 17 & 7) as usize).copied().unwrap_or(ExitKind::PioIn);
            Handled {
                origin: Origin::vcpu((what >> 24) as u8, exit, self.rip.load(Ordering::Relaxed)),
                bank: (what & 0xff) as usize,
                offset: self.offset.load(Ordering::Relaxed),
                size: (what >> 8) as u8,
                is_write: what >> 16 & 1 != 0,
                value: self.value.load(Ordering::Relaxed),
                register: None,
            }
        });
        (self.turn.load(Ordering::Acquire) == turn).then_some((turn, access))
    }
}

thread_local! {
    static CURRENT: Cell<u16> = const { Cell::new(0) };
    static PANIC: RefCell<Option<(String, Vec<String>)>> = const { RefCell::new(None) };
    static TOUCHED: Cell<Option<&'static Register>> = const { Cell::new(None) };
}

/// The number of the slot whose device this thread is in; 0 outside of all devices.
pub fn current() -> u16 {
    CURRENT.get()
}
pub(crate) fn set_current(id: u16) -> u16 {
    CURRENT.replace(id)
}
/// The register that the access in hand reaches.
pub(crate) fn touch(register: Option<&'static Register>) {
    TOUCHED.set(register);
}
pub(crate) fn touched() -> Option<&'static Register> {
    TOUCHED.get()
}
pub(crate) fn take_panic() -> Option<(String, Vec<String>)> {
    PANIC.with_borrow_mut(Option::take)
}

/// Has panics inside of devices kept (place and stack, for the crash report) instead of printed. Other panics are printed as before.
pub fn contain_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if current() == 0 {
                return before(info);
            }
            let place = info
                .location()
                .map_or(String::new(), |l| format!("{}:{}:{}", l.file(), l.line(), l.column()));
            let frames = stack(&Backtrace::force_capture().to_string());
            let _ = PANIC.try_with(|p| p.try_borrow_mut().map(|mut p| *p = Some((place, frames))));
        }));
    });
}

/// Function names of a printed backtrace, `function at file:line`, without the panic's own machinery.
fn stack(text: &str) -> Vec<String> {
    let mut frames: Vec<String> = Vec::new();
    for line in text.lines().map(str::trim) {
        match (line.strip_prefix("at "), line.split_once(": ")) {
            (Some(at), _) => {
                if let Some(last) = frames.last_mut().filter(|f| !f.contains(" at ")) {
                    *last = format!("{last} at {}", at.trim_start_matches("./"));
                }
            }
            (None, Some((n, name))) if n.parse::<u32>().is_ok() => frames.push(name.to_string()),
            _ => {}
        }
    }
    let first =
        frames.iter().rposition(|f| f.starts_with("core::panicking") || f.contains("rust_begin_unwind"));
    let mut frames = frames.split_off(first.map_or(0, |f| f + 1));
    frames.truncate(64);
    frames
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_hand_can_be_seen() {
        let hand = Hand::default();
        assert!(hand.busy().is_none());
        let who = Origin::vcpu(2, ExitKind::MmioWrite, 0x7c10);
        let doing = Doing { bank: 1, offset: 0x12, size: 2, is_write: true, value: 0x58 };
        hand.enter(Some(&who), Some(&doing));
        let (turn, access) = hand.busy().unwrap();
        let a = access.unwrap();
        assert_eq!((a.bank, a.offset, a.size, a.is_write, a.value), (1, 0x12, 2, true, 0x58));
        assert_eq!(
            (a.origin.actor, a.origin.exit, a.origin.rip),
            (Actor::Vcpu(2), ExitKind::MmioWrite, 0x7c10)
        );
        hand.leave();
        assert!(hand.busy().is_none());
        hand.enter(None, None);
        let (next, access) = hand.busy().unwrap();
        assert!(next > turn && access.is_none());
    }

    #[test]
    fn a_printed_stack_is_read() {
        let text = "   0: std::backtrace\n             at /x/backtrace.rs:1:2\n   1: core::panicking::panic_fmt\n             at ./p.rs:3:4\n   2: dev::write\n             at ./src/dev.rs:5:6\n   3: main\n";
        assert_eq!(stack(text), ["dev::write at src/dev.rs:5:6", "main"]);
    }
}
