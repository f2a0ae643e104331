//! Virtual time and the queue of timers.
//!
//! Virtual time is in nanoseconds since power-on. It follows the host's monotonic clock, or, in deterministic machines, the
//! number of instructions executed.

use hyaline_device::{Ns, SECOND, Slot};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Where time comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeBase {
    /// The host's monotonic clock.
    Host,
    /// The instruction count; each instruction takes this many nanoseconds (at least 1).
    Instructions(u64),
}

/// The machine's clock. It stands still while the machine is stopped.
#[derive(Debug)]
pub struct Clock {
    base: TimeBase,
    /// Virtual time at `since`, or the whole of it for a counted clock.
    now: AtomicU64,
    since: Mutex<Option<Instant>>,
    /// Wall-clock nanoseconds since the Unix epoch at virtual time zero; moves when the guest sets its RTC's base.
    wall: AtomicU64,
    /// `since` as nanoseconds after `origin`, so that readers need no lock; u64::MAX while stopped.
    started: AtomicU64,
    origin: Instant,
    /// Ticks of the time-stamp counter per second.
    tsc_hz: AtomicU64,
}

const STOPPED: u64 = u64::MAX;

impl Clock {
    /// A stopped clock at zero. `wall` is the guest's wall-clock time at zero, in nanoseconds since the Unix epoch; None: the
    /// host's time now.
    pub fn new(base: TimeBase, wall: Option<u64>) -> Clock {
        let wall = wall.unwrap_or_else(host_wall);
        Clock {
            base,
            now: AtomicU64::new(0),
            since: Mutex::new(None),
            wall: AtomicU64::new(wall),
            started: AtomicU64::new(STOPPED),
            origin: Instant::now(),
            tsc_hz: AtomicU64::new(SECOND),
        }
    }

    /// Where time comes from.
    pub fn base(&self) -> TimeBase {
        self.base
    }

    /// Virtual time.
    #[inline]
    pub fn now(&self) -> Ns {
        let now = self.now.load(Ordering::Acquire);
        match self.started.load(Ordering::Acquire) {
            STOPPED => now,
            started => now + (self.origin.elapsed().as_nanos() as u64).saturating_sub(started),
        }
    }

    /// The host's monotonic clock, in nanoseconds.
    pub fn host(&self) -> u64 {
        self.origin.elapsed().as_nanos() as u64
    }

    /// Wall-clock time of the guest.
    pub fn wall(&self) -> u64 {
        self.wall.load(Ordering::Relaxed).wrapping_add(self.now())
    }

    /// Lets time pass (host clock only; a counted clock passes by [`Clock::advance`]).
    pub fn start(&self) {
        let mut since = lock(&self.since);
        if self.base == TimeBase::Host && since.is_none() {
            let now = Instant::now();
            *since = Some(now);
            self.started.store(now.duration_since(self.origin).as_nanos() as u64, Ordering::Release);
        }
    }

    /// Stops time.
    pub fn stop(&self) {
        let mut since = lock(&self.since);
        if since.take().is_some() {
            let now = self.now();
            self.started.store(STOPPED, Ordering::Release);
            self.now.store(now, Ordering::Release);
        }
    }

    /// Counted clock: `ns` nanoseconds have passed.
    pub fn advance(&self, ns: Ns) {
        self.now.fetch_add(ns, Ordering::AcqRel);
    }

    /// Counted clock: it is `now`, unless it is later already.
    pub fn reach(&self, now: Ns) {
        self.now.fetch_max(now, Ordering::AcqRel);
    }

    /// Sets a stopped clock, when a saved machine is restored.
    pub fn restore(&self, now: Ns, wall_at_zero: u64) {
        self.now.store(now, Ordering::Release);
        self.wall.store(wall_at_zero, Ordering::Relaxed);
    }

    /// Ticks of the machine's time-stamp counter since virtual time zero.
    pub fn tsc(&self) -> u64 {
        let hz = self.tsc_hz.load(Ordering::Relaxed);
        let now = self.now();
        if hz == SECOND { now } else { scale(now, hz, SECOND) }
    }

    /// Virtual time at which that counter reaches a value, rounded up.
    pub fn time_of_tsc(&self, ticks: u64) -> Ns {
        let hz = self.tsc_hz.load(Ordering::Relaxed);
        if hz == SECOND {
            return ticks;
        }
        let ns = (u128::from(ticks) * u128::from(SECOND)).div_ceil(u128::from(hz.max(1)));
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    /// Ticks of that counter in a second.
    pub fn tsc_hz(&self) -> u64 {
        self.tsc_hz.load(Ordering::Relaxed)
    }

    /// Changes them. The counter's value jumps, when time has passed already: whoever changes it makes up for that.
    pub fn set_tsc_hz(&self, hz: u64) {
        self.tsc_hz.store(hz, Ordering::Relaxed);
    }

    /// Wall-clock time at virtual time zero, for saving.
    pub fn wall_at_zero(&self) -> u64 {
        self.wall.load(Ordering::Relaxed)
    }
}

/// `value * by / per`, without overflow in between.
fn scale(value: u64, by: u64, per: u64) -> u64 {
    (u128::from(value) * u128::from(by) / u128::from(per)) as u64
}

fn host_wall() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Timers of all devices, in virtual time.
#[derive(Default)]
pub struct Timers {
    queue: Mutex<Queue>,
    changed: Condvar,
    /// Deadline of the earliest timer, u64::MAX if none: for run loops.
    next: AtomicU64,
    closed: AtomicBool,
}

#[derive(Default)]
struct Queue {
    /// Time, slot id, timer, insertion number. Among equals the order is the slots', not that of arming, which a saved state does not have.
    heap: BinaryHeap<Reverse<(Ns, u16, u32, u64)>>,
    /// What is armed now: the heap may hold stale entries.
    armed: HashMap<(u16, u32), (Ns, u64)>,
    slots: HashMap<u16, Weak<Slot>>,
    count: u64,
}

impl Queue {
    fn first(&mut self) -> Option<(Ns, u16, u32)> {
        while let Some(&Reverse((at, slot, timer, n))) = self.heap.peek() {
            if self.armed.get(&(slot, timer)) == Some(&(at, n)) {
                return Some((at, slot, timer));
            }
            self.heap.pop();
        }
        None
    }
}

impl Timers {
    /// An empty queue.
    pub fn new() -> Timers {
        Timers { next: AtomicU64::new(u64::MAX), ..Timers::default() }
    }

    /// Arms (or with None disarms) a timer of a slot.
    pub fn set(&self, slot: &Arc<Slot>, timer: u32, at: Option<Ns>) {
        let mut q = lock(&self.queue);
        let key = (slot.id(), timer);
        match at {
            Some(at) => {
                q.count += 1;
                let n = q.count;
                q.armed.insert(key, (at, n));
                q.heap.push(Reverse((at, key.0, key.1, n)));
                q.slots.entry(key.0).or_insert_with(|| Arc::downgrade(slot));
            }
            None => {
                q.armed.remove(&key);
            }
        }
        self.publish(&mut q);
    }

    fn publish(&self, q: &mut Queue) {
        let next = q.first().map_or(u64::MAX, |f| f.0);
        if self.next.swap(next, Ordering::AcqRel) != next {
            self.changed.notify_all();
        }
    }

    /// Deadline of the earliest timer; `u64::MAX` if none.
    pub fn next(&self) -> Ns {
        self.next.load(Ordering::Acquire)
    }

    /// Fires all timers due at `now`, in order of their times. At most 10,000 in one call, so that a timer re-armed in the
    /// past can't hold the caller for ever.
    pub fn fire(&self, now: Ns) {
        for _ in 0..10_000 {
            let (slot, timer) = {
                let mut q = lock(&self.queue);
                match q.first() {
                    Some((at, slot, timer)) if at <= now => {
                        q.heap.pop();
                        q.armed.remove(&(slot, timer));
                        let slot = q.slots.get(&slot).and_then(Weak::upgrade);
                        self.publish(&mut q);
                        (slot, timer)
                    }
                    _ => return,
                }
            };
            if let Some(slot) = slot {
                slot.timer(timer);
            }
        }
    }

    /// What is armed: slot id, timer, time. For saving and for the monitor.
    pub fn armed(&self) -> Vec<(u16, u32, Ns)> {
        let mut all: Vec<_> = lock(&self.queue).armed.iter().map(|(k, v)| (k.0, k.1, v.0)).collect();
        all.sort_unstable();
        all
    }

    /// Disarms all timers.
    pub fn clear(&self) {
        let mut q = lock(&self.queue);
        q.armed.clear();
        q.heap.clear();
        self.publish(&mut q);
    }

    /// Ends [`Timers::serve`].
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        let _guard = lock(&self.queue);
        self.changed.notify_all();
    }

    /// Fires timers by the host's clock until [`Timers::close`]: the body of the timer thread.
    pub fn serve(&self, clock: &Clock) {
        while !self.closed.load(Ordering::Acquire) {
            self.fire(clock.now());
            let q = lock(&self.queue);
            if self.closed.load(Ordering::Acquire) {
                return;
            }
            let (next, now) = (self.next(), clock.now());
            if next <= now {
                continue;
            }
            // While the clock stands still the wait is bounded too: it may be started at any time.
            let wait = Duration::from_nanos((next - now).min(SECOND / 10));
            drop(self.changed.wait_timeout(q, wait));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counted_clock_moves_only_by_count() {
        let c = Clock::new(TimeBase::Instructions(1), Some(5));
        c.start();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!((c.now(), c.wall()), (0, 5));
        c.advance(7);
        assert_eq!((c.now(), c.wall()), (7, 12));
    }

    #[test]
    fn a_stopped_clock_stands_still_and_goes_on_where_it_stopped() {
        let c = Clock::new(TimeBase::Host, None);
        assert_eq!(c.now(), 0);
        c.start();
        std::thread::sleep(Duration::from_millis(2));
        c.stop();
        let t = c.now();
        assert!(t >= 2_000_000);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(c.now(), t);
        c.start();
        assert!(c.now() >= t);
    }
}
