//! The 8254 timer of a PC, with port 61h.
//!
//! Manual: Intel 8254 Programmable Interval Timer, order number 231164-005; port 61h: Intel 82371SB (PIIX3), order number 290550, "NSC, NMI
//! status and control register".
//!
//! A counter is not stepped: what it holds is computed from the number of clocks since it was loaded. Only the edges of
//! OUT 0 cost a timer.
//!
//! ```text
//! n = count loaded, d = clocks since the load (one clock after the write or the trigger)
//! mode 0  OUT ____________~~~~~~~~   low until d = n
//! mode 1  OUT ~~~|___________|~~~~   low from the trigger's load until d = n
//! mode 2  OUT ~~~~~~~~~~|_|~~~~~~~   low for the clock with count 1, period n
//! mode 3  OUT ~~~~~~|_____|~~~~~~|   high (n+1)/2 clocks, low n/2 clocks
//! mode 4  OUT ~~~~~~~~~~~|_|~~~~~~   low for the one clock d = n after a write
//! mode 5  OUT ~~~~~~~~~~~|_|~~~~~~   low for the one clock d = n after a trigger
//! ```

use super::PIT;
use hyaline_device::state::{StateError, Value, ensure, from_value, to_value};
use hyaline_device::{Chip, Cx, Device, IoError, Limits, Ns, Register, Reset};
use serde::{Deserialize, Serialize};

/// The chip's head.
pub static CHIP: Chip = Chip {
    name: "i8254",
    title: "Intel 8254 programmable interval timer",
    manual: "Intel 8254 data sheet (231164-005); port 61h: Intel 82371SB PIIX3 (290550)",
    modelled: "three counters, all six modes, binary and BCD, counter latch, read-back of count and status, null count, reload rules, gate of \
        counter 2 by port 61h; the clock is 105/88 MHz (1.1931818 MHz).",
    not_modelled: "no sound comes from the speaker; IOCHK# and SERR# never raise an NMI. The 8254 has no reset: here counters stop until they are programmed.",
    deviations: "The refresh toggle of port 61h changes every 18 clocks (15.09 µs) whatever counter 1 was programmed to, as firmware sets it. In modes 2 and 3 a count of \
        1, which the manual forbids, gives no edges.",
    banks: &[&PORTS, &PORT61],
    outputs: &["out0"],
    inputs: &[],
};

hyaline_device::registers! {
    /// Ports 40h-43h.
    pub bank PORTS "ports" Port 4 {
        COUNTER0 0x0 1 rw = 0x00, "8254, read and write operations", "Counter 0: the system timer" !effect;
        COUNTER1 0x1 1 rw = 0x00, "8254, read and write operations", "Counter 1: memory refresh" !effect;
        COUNTER2 0x2 1 rw = 0x00, "8254, read and write operations", "Counter 2: speaker" !effect;
        CONTROL  0x3 1 wo = 0x00, "8254, control word format; read-back command", "Mode, latch, read-back"
            { BCD 0; MODE 1..=3 {0 "0 terminal count", 1 "1 one-shot", 2 "2 rate", 3 "3 square wave", 4 "4 software strobe", 5 "5 hardware strobe",
                6 "2 rate", 7 "3 square wave"};
              RW 4..=5 {0 "latch", 1 "low byte", 2 "high byte", 3 "low then high byte"};
              SELECT 6..=7 {0 "counter 0", 1 "counter 1", 2 "counter 2", 3 "read-back"} };
    }
}

hyaline_device::registers! {
    /// Port 61h.
    pub bank PORT61 "port61" Port 1 {
        NSC 0x0 1 rw = 0x00, "PIIX3, NSC", "NMI status and control: gate of counter 2, speaker"
            { GATE2 0; SPEAKER 1; SERR_OFF 2; IOCHK_OFF 3; REFRESH 4 ro; OUT2 5 ro; IOCHK 6 ro; SERR 7 ro };
    }
}

/// One counter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counter {
    /// Mode 0 to 5.
    pub mode: u8,
    /// Counts in four decimal digits.
    pub bcd: bool,
    /// Bytes to read and write: 1 low, 2 high, 3 low then high.
    pub rw: u8,
    /// The count register: the count last written.
    pub count: u16,
    /// A count was written since the control word.
    pub written: bool,
    /// The first of two bytes, while the second is awaited.
    pub low: Option<u8>,
    /// The second of two bytes is read next.
    pub high_next: bool,
    /// Latched count.
    pub latch: Option<u16>,
    /// Latched status.
    pub status: Option<u8>,
    /// Level of GATE.
    pub gate: bool,
    /// What the counting element was loaded with, 1 to 65536; 0: not since the control word.
    pub n: u32,
    /// Clock number of that load; may lie one ahead.
    pub start: u64,
    /// Clocks counted, while counting is held.
    pub held: Option<u64>,
    /// Mode 3: in the half with OUT high, and `start` begins the half.
    pub half: bool,
    /// Modes 2 and 3: the count for the next cycle.
    pub next: Option<u32>,
    /// Modes 1 and 5: a count was written that no trigger has loaded.
    pub fresh: bool,
    /// What the counting element held before `start`.
    pub before: u16,
    /// OUT before `start`.
    pub out_before: bool,
}

impl Counter {
    fn new(gate: bool) -> Counter {
        Counter {
            mode: 0,
            bcd: false,
            rw: 3,
            count: 0,
            written: false,
            low: None,
            high_next: false,
            latch: None,
            status: None,
            gate,
            n: 0,
            start: 0,
            held: None,
            half: true,
            next: None,
            fresh: false,
            before: 0,
            out_before: false,
        }
    }

    fn check(&self) -> Result<(), StateError> {
        let counts = [Some(self.n), self.next];
        ensure(self.mode < 6 && (1..=3).contains(&self.rw), || {
            format!("8254: a counter can't have mode {} and access {}", self.mode, self.rw)
        })?;
        ensure(counts.iter().flatten().all(|n| *n <= self.modulus()) && self.next != Some(0), || {
            "8254: a count is out of range".to_string()
        })?;
        ensure(self.start < 1 << 60 && self.held.is_none_or(|d| d < 1 << 60), || {
            format!("8254: clock {} lies too far ahead", self.start)
        })
    }

    fn modulus(&self) -> u32 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    /// The count register's meaning, 1 to 65536 (or 10000).
    fn amount(&self) -> u32 {
        let n = if self.bcd {
            (0..4).map(|i| u32::from(self.count >> (4 * i) & 0xf) * 10u32.pow(i)).sum::<u32>() % 10_000
        } else {
            u32::from(self.count)
        };
        if n == 0 { self.modulus() } else { n }
    }

    fn elapsed(&self, now: u64) -> u64 {
        self.held.unwrap_or_else(|| now.saturating_sub(self.start))
    }

    /// Length of the present half in mode 3.
    fn half_len(&self) -> u64 {
        u64::from(if self.half { self.n.div_ceil(2) } else { self.n / 2 })
    }

    /// Brings modes 2 and 3 into the cycle that holds `now`; a new count is taken at the end of a cycle (mode 3: of a half).
    fn advance(&mut self, now: u64) {
        if self.n == 0 || self.held.is_some() || now < self.start {
            return;
        }
        let n = u64::from(self.n);
        match self.mode {
            2 => {
                if let Some(next) = self.next.take_if(|_| now - self.start >= n) {
                    self.start += n;
                    self.n = next;
                }
                self.start += (now - self.start) / u64::from(self.n) * u64::from(self.n);
            }
            3 => {
                // At most: end of a half with the new count, whole periods, end of a half.
                for _ in 0..3 {
                    let len = self.half_len();
                    if now - self.start < len {
                        break;
                    }
                    self.start += len;
                    self.half = !self.half;
                    if let Some(next) = self.next.take() {
                        self.n = next;
                    }
                    self.start += (now - self.start) / u64::from(self.n) * u64::from(self.n);
                }
            }
            _ => {}
        }
    }

    /// The counting element as software reads it.
    fn value(&self, now: u64) -> u16 {
        if self.n == 0 || (self.held.is_none() && now < self.start) {
            return self.before;
        }
        let (d, n, m) = (self.elapsed(now), u64::from(self.n), u64::from(self.modulus()));
        let v = match self.mode {
            2 => n - d % n,
            3 => (n & !1).saturating_sub(2 * d),
            _ => n + m - d % m,
        } % m;
        if self.bcd {
            (0..4).map(|i| (v / 10u64.pow(i) % 10) << (4 * i)).sum::<u64>() as u16
        } else {
            v as u16
        }
    }

    /// Level of OUT.
    fn out(&self, now: u64) -> bool {
        let idle = self.mode != 0;
        if self.n == 0 || (self.mode == 0 && self.low.is_some()) {
            return idle;
        }
        if self.held.is_none() && now < self.start && self.mode != 0 {
            return self.out_before;
        }
        let (d, n) = (self.elapsed(now), u64::from(self.n));
        match self.mode {
            0 | 1 => d >= n,
            2 => !self.gate || n == 1 || d % n != n - 1,
            3 => !self.gate || n == 1 || self.half,
            _ => d != n,
        }
    }

    /// The next clock at which OUT may change.
    fn next_edge(&self, now: u64) -> Option<u64> {
        if self.n == 0 || self.held.is_some() {
            return None;
        }
        let (s, n) = (self.start, u64::from(self.n));
        if now < s {
            return Some(s);
        }
        let candidates = match self.mode {
            0 | 1 => [s + n, 0],
            2 | 3 if n == 1 => [self.next.map_or(0, |_| s + 1), 0],
            2 => [s + n - 1, s + n],
            3 => [s + self.half_len(), 0],
            _ => [s + n, s + n + 1],
        };
        candidates.into_iter().find(|c| *c > now)
    }

    /// Puts a count into the counting element on the next clock.
    fn load(&mut self, n: u32, now: u64) {
        (self.before, self.out_before) = (self.value(now), self.out(now));
        self.n = n;
        self.start = now + 1;
        self.half = true;
        self.next = None;
        self.held = None;
    }

    fn control(&mut self, v: u8, now: u64) {
        let before = self.value(now);
        let mode = v >> 1 & 7;
        *self = Counter {
            mode: if mode > 5 { mode & 3 } else { mode },
            bcd: v & 1 != 0,
            rw: v >> 4 & 3,
            count: self.count,
            before,
            out_before: mode != 0,
            ..Counter::new(self.gate)
        };
    }

    fn write(&mut self, v: u8, now: u64, cx: &mut Cx<'_>) {
        self.advance(now);
        self.count = match (self.rw, self.low) {
            (1, _) => u16::from(v),
            (2, _) => u16::from(v) << 8,
            (_, None) => {
                if self.mode == 0 {
                    // "Writing the first byte disables counting. OUT is set low immediately."
                    self.held = Some(self.elapsed(now));
                }
                self.low = Some(v);
                return;
            }
            (_, Some(low)) => u16::from_le_bytes([low, v]),
        };
        self.low = None;
        let first = !std::mem::replace(&mut self.written, true);
        let n = self.amount();
        match self.mode {
            0 | 4 => {
                self.load(n, now);
                self.held = (!self.gate).then_some(0);
            }
            1 | 5 => self.fresh = true,
            _ => {
                if n == 1 {
                    cx.guest_error("8254: a count of 1 is not allowed in modes 2 and 3");
                }
                if first {
                    self.load(n, now);
                    self.held = (!self.gate).then_some(0);
                } else {
                    self.next = Some(n);
                }
            }
        }
    }

    fn set_gate(&mut self, level: bool, now: u64) {
        if level == self.gate {
            return;
        }
        self.advance(now);
        match (self.mode, level) {
            (0 | 4, false) if self.n != 0 && self.held.is_none() => self.held = Some(self.elapsed(now)),
            (0 | 4, true) if self.low.is_none() || self.mode == 4 => {
                if let Some(d) = self.held.take() {
                    self.start = now.saturating_sub(d);
                }
            }
            (1 | 5, true) if self.written => {
                let n = self.amount();
                self.load(n, now);
                self.fresh = false;
            }
            (2 | 3, false) if self.n != 0 => self.held = Some(self.elapsed(now)),
            (2 | 3, true) if self.n != 0 => {
                let n = self.amount();
                self.load(n, now);
                self.out_before = true;
            }
            _ => {}
        }
        self.gate = level;
    }

    fn status(&self, now: u64) -> u8 {
        let loading = self.held.is_none() && now < self.start;
        let null = self.n == 0 || loading || self.next.is_some() || self.fresh;
        u8::from(self.out(now)) << 7
            | u8::from(null) << 6
            | self.rw << 4
            | self.mode << 1
            | u8::from(self.bcd)
    }

    fn read(&mut self, now: u64) -> u8 {
        self.advance(now);
        if let Some(s) = self.status.take() {
            return s;
        }
        let [low, high] = self.latch.unwrap_or_else(|| self.value(now)).to_le_bytes();
        let (byte, last) = match self.rw {
            1 => (low, true),
            2 => (high, true),
            _ if self.high_next => (high, true),
            _ => (low, false),
        };
        self.high_next = !last;
        if last {
            self.latch = None;
        }
        byte
    }

    fn latch_count(&mut self, now: u64) {
        self.advance(now);
        if self.latch.is_none() {
            self.latch = Some(self.value(now));
        }
    }

    fn latch_status(&mut self, now: u64) {
        self.advance(now);
        if self.status.is_none() {
            self.status = Some(self.status(now));
        }
    }
}

/// What is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The three counters.
    pub counters: [Counter; 3],
    /// The writable bits of port 61h.
    pub nsc: u8,
    /// Level of the OUT 0 line.
    pub out0: bool,
    /// Clock up to which the edges of OUT 0 were passed on.
    pub seen: u64,
}

impl State {
    /// May a restored file hold this?
    ///
    /// # Errors
    /// A mode or a count out of range.
    pub fn check(&self) -> Result<(), StateError> {
        self.counters.iter().try_for_each(Counter::check)?;
        ensure(self.nsc < 16, || format!("8254: port 61h can't hold {:#x}", self.nsc))?;
        ensure(self.counters[2].gate == (self.nsc & 1 != 0), || {
            "8254: the gate of counter 2 is not what port 61h says".to_string()
        })
    }
}

/// The timer.
#[derive(Debug)]
pub struct I8254 {
    state: State,
}

impl Default for I8254 {
    fn default() -> Self {
        I8254::new()
    }
}

impl I8254 {
    /// A timer that nobody has programmed.
    pub fn new() -> I8254 {
        let counters = [Counter::new(true), Counter::new(true), Counter::new(false)];
        I8254 { state: State { counters, nsc: 0, out0: false, seen: 0 } }
    }

    /// Passes on the edges of OUT 0 up to now and sets the timer for the next. On a machine that runs by the host's clock the timer comes late, often by more than a
    /// whole low pulse of mode 2: the line then falls and rises at once. Of many
    /// cycles missed one is passed on: the next fall would withdraw its request while the processor is about to acknowledge it, which is a
    /// spurious interrupt 7.
    fn update(&mut self, cx: &mut Cx<'_>) {
        let now = PIT.ticks(cx.now());
        let s = &mut self.state;
        let c = &mut s.counters[0];
        for last in [false, false, true] {
            let at = if last { now } else { c.next_edge(s.seen).map_or(now, |t| t.min(now)) };
            c.advance(at);
            let level = c.out(at);
            if level != s.out0 {
                s.out0 = level;
                cx.line(0).set(level);
            }
            s.seen = at;
        }
        self.arm(cx);
    }

    fn arm(&self, cx: &mut Cx<'_>) {
        let c = &self.state.counters[0];
        match c.next_edge(PIT.ticks(cx.now())) {
            // The low pulse of mode 2 lasts one clock, 838 ns. A timer of the host would make milliseconds of it on a busy host, in which
            // a request that the processor did not acknowledge in time would be withdrawn: its end is waited for, and the line falls and
            // rises at once.
            Some(tick) if c.mode == 2 && c.n > 1 && tick + 1 == c.start + u64::from(c.n) => {
                cx.at(0, PIT.time(tick + 1));
            }
            Some(tick) => cx.at(0, PIT.time(tick)),
            None => cx.cancel(0),
        }
    }

    fn nsc(&self, time: Ns) -> u8 {
        let now = PIT.ticks(time);
        let mut c = self.state.counters[2].clone();
        c.advance(now);
        self.state.nsc | (((now / 18) & 1) as u8) << 4 | u8::from(c.out(now)) << 5
    }
}

impl Device for I8254 {
    fn chip(&self) -> &'static Chip {
        &CHIP
    }

    fn limits(&self, _bank: usize) -> Limits {
        Limits::DEFAULT.implemented(1, 1)
    }

    fn read(&mut self, bank: usize, offset: u64, _size: u8, cx: &mut Cx<'_>) -> Result<u64, IoError> {
        let now = PIT.ticks(cx.now());
        if (bank, offset) == (0, 0) {
            self.update(cx);
        }
        match (bank, offset) {
            (0, 0..3) => Ok(u64::from(self.state.counters[offset as usize].read(now))),
            (0, 3) => Err(IoError::WriteOnly),
            (1, 0) => Ok(u64::from(self.nsc(cx.now()))),
            _ => Err(IoError::NotHere),
        }
    }

    fn write(
        &mut self,
        bank: usize,
        offset: u64,
        _size: u8,
        value: u64,
        cx: &mut Cx<'_>,
    ) -> Result<(), IoError> {
        let (now, v) = (PIT.ticks(cx.now()), value as u8);
        if bank == 0 {
            // What happened before the write comes first.
            self.update(cx);
        }
        let counters = &mut self.state.counters;
        match (bank, offset) {
            (0, 0..3) => {
                counters[offset as usize].write(v, now, cx);
                if offset == 0 {
                    self.update(cx);
                }
            }
            (0, 3) if v >> 6 == 3 => {
                for (_, c) in counters.iter_mut().enumerate().filter(|(i, _)| v >> (i + 1) & 1 != 0) {
                    if v & 0x20 == 0 {
                        c.latch_count(now);
                    }
                    if v & 0x10 == 0 {
                        c.latch_status(now);
                    }
                }
            }
            (0, 3) => {
                let which = usize::from(v >> 6);
                counters[which].advance(now);
                if v & 0x30 == 0 {
                    counters[which].latch_count(now);
                } else {
                    counters[which].control(v, now);
                    if which == 0 {
                        self.update(cx);
                    }
                }
            }
            (1, 0) => {
                self.state.nsc = NSC.write(0, value) as u8;
                counters[2].set_gate(v & 1 != 0, now);
            }
            _ => return Err(IoError::NotHere),
        }
        Ok(())
    }

    fn peek(&self, bank: usize, _register: &Register) -> Option<u64> {
        // What a counter holds depends on the time.
        (bank == 1).then(|| u64::from(self.state.nsc))
    }

    fn timer(&mut self, _timer: u32, cx: &mut Cx<'_>) {
        self.update(cx);
    }

    fn reset(&mut self, _kind: Reset, cx: &mut Cx<'_>) {
        self.state = State { seen: PIT.ticks(cx.now()), ..I8254::new().state };
        cx.line(0).set(false);
        cx.cancel(0);
    }

    fn save(&self) -> Result<Value, StateError> {
        to_value(&self.state)
    }

    fn load(&mut self, state: &Value, cx: &mut Cx<'_>) -> Result<(), StateError> {
        let state: State = from_value(state)?;
        state.check()?;
        self.state = state;
        self.arm(cx);
        Ok(())
    }

    fn as_any(&mut self) -> Option<&mut dyn std::any::Any> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyaline_device::{Bench, SECOND};

    hyaline_device::device_laws!(I8254::new());

    fn bench() -> Bench<I8254> {
        Bench::new(I8254::new())
    }

    /// Lets the clock stand at the beginning of clock `n` from now on.
    fn clocks(b: &mut Bench<I8254>, n: u64) {
        let tick = PIT.ticks(b.now()) + n;
        let ns = PIT.time(tick) - b.now();
        b.run(ns);
    }

    fn program(b: &mut Bench<I8254>, counter: u64, mode: u8, count: u16) {
        b.out8(3, (counter as u8) << 6 | 0x30 | mode << 1);
        for v in count.to_le_bytes() {
            b.out8(counter, v);
        }
    }

    fn count(b: &mut Bench<I8254>, counter: u64) -> u16 {
        b.out8(3, (counter as u8) << 6);
        u16::from_le_bytes([b.in8(counter), b.in8(counter)])
    }

    /// OUT 2, as port 61h shows it.
    fn out2(b: &mut Bench<I8254>) -> bool {
        b.read(1, 0, 1) & 0x20 != 0
    }

    /// OUT 2 for `n` clocks from the next on.
    fn wave(b: &mut Bench<I8254>, n: usize) -> String {
        let mut one = || {
            clocks(b, 1);
            if out2(b) { '~' } else { '_' }
        };
        (0..n).map(|_| one()).collect()
    }

    #[test]
    fn mode_0_interrupt_on_terminal_count() {
        let mut b = bench();
        program(&mut b, 0, 0, 4);
        assert!(!b.level(0));
        clocks(&mut b, 4);
        assert_eq!((count(&mut b, 0), b.level(0)), (1, false), "n + 1 clocks after the write");
        clocks(&mut b, 1);
        assert_eq!((count(&mut b, 0), b.level(0)), (0, true));
        clocks(&mut b, 1);
        assert_eq!((count(&mut b, 0), b.level(0)), (0xffff, true), "it counts on");
        b.out8(0, 9);
        clocks(&mut b, 5);
        assert_eq!(count(&mut b, 0), 0xffff, "the first byte stops counting");
        b.write(1, 0, 1, 1);
        program(&mut b, 2, 0, 3);
        clocks(&mut b, 2);
        b.write(1, 0, 1, 0);
        clocks(&mut b, 7);
        assert_eq!(count(&mut b, 2), 2, "GATE low holds");
        b.write(1, 0, 1, 1);
        assert_eq!(wave(&mut b, 3), "_~~");
    }

    #[test]
    fn mode_1_one_shot() {
        let mut b = bench();
        program(&mut b, 2, 1, 3);
        assert_eq!(wave(&mut b, 3), "~~~", "no trigger yet");
        b.write(1, 0, 1, 1);
        assert_eq!(wave(&mut b, 6), "___~~~");
        b.write(1, 0, 1, 0);
        b.write(1, 0, 1, 1);
        assert_eq!(wave(&mut b, 2), "__");
        b.write(1, 0, 1, 0);
        b.write(1, 0, 1, 1);
        assert_eq!(wave(&mut b, 4), "___~", "retriggered");
    }

    #[test]
    fn mode_2_rate_generator() {
        let mut b = bench();
        b.write(1, 0, 1, 1);
        program(&mut b, 2, 2, 3);
        assert_eq!(wave(&mut b, 7), "~~_~~_~");
        program(&mut b, 2, 2, 3);
        clocks(&mut b, 1);
        for v in [5, 0] {
            b.out8(2, v);
        }
        assert_eq!(wave(&mut b, 8), "~_~~~~_~", "a new count waits for the end of the cycle");
        b.write(1, 0, 1, 0);
        assert_eq!(wave(&mut b, 3), "~~~");
        b.write(1, 0, 1, 1);
        assert_eq!(wave(&mut b, 5), "~~~~_", "a trigger reloads");
    }

    #[test]
    fn mode_2_system_timer_rate() {
        let mut b = bench();
        program(&mut b, 0, 2, 11932);
        b.rises(0);
        b.run(SECOND);
        assert_eq!(b.rises(0), 99, "11932 / 1.1931818 MHz is a little over 10 ms");
    }

    /// The guest looks at the count after the edge was due and before the machine's timer came.
    #[test]
    fn a_read_before_a_late_timer_loses_no_edge() {
        let mut b = bench();
        program(&mut b, 0, 2, 1193);
        b.skip(hyaline_device::ms(1) + 500_000);
        count(&mut b, 0);
        assert_eq!(b.rises(0), 2, "OUT goes high with the control word, and after the low pulse");
        b.call(|d, cx| d.timer(0, cx));
        assert_eq!(b.rises(0), 0, "passed on already");
        b.skip(50 * hyaline_device::ms(1));
        b.call(|d, cx| d.timer(0, cx));
        assert_eq!(b.rises(0), 1, "of many cycles missed one is made up for");
    }

    #[test]
    fn mode_3_square_wave() {
        let mut b = bench();
        b.write(1, 0, 1, 1);
        program(&mut b, 2, 3, 4);
        assert_eq!(wave(&mut b, 9), "~~__~~__~");
        program(&mut b, 2, 3, 5);
        assert_eq!(wave(&mut b, 11), "~~~__~~~__~");
        program(&mut b, 2, 3, 5);
        let mut held = Vec::new();
        for _ in 0..6 {
            clocks(&mut b, 1);
            held.push(count(&mut b, 2));
        }
        assert_eq!(held, [4, 2, 0, 4, 2, 4], "by two from n - 1");
        program(&mut b, 2, 3, 8);
        clocks(&mut b, 2);
        for v in [2, 0] {
            b.out8(2, v);
        }
        assert_eq!(wave(&mut b, 5), "~~_~_", "a new count waits for the end of the half");
    }

    #[test]
    fn mode_4_and_5_strobes() {
        let mut b = bench();
        b.write(1, 0, 1, 1);
        program(&mut b, 2, 4, 2);
        assert_eq!(wave(&mut b, 6), "~~_~~~");
        b.write(1, 0, 1, 0);
        program(&mut b, 2, 5, 2);
        assert_eq!(wave(&mut b, 4), "~~~~");
        b.write(1, 0, 1, 1);
        assert_eq!(wave(&mut b, 5), "~~_~~");
    }

    #[test]
    fn bcd_counts_decimal() {
        let mut b = bench();
        b.out8(3, 0x31);
        b.out8(0, 0x00);
        b.out8(0, 0x10);
        clocks(&mut b, 2);
        assert_eq!(count(&mut b, 0), 0x0999);
        b.out8(3, 0x31);
        b.out8(0, 0);
        b.out8(0, 0);
        clocks(&mut b, 2);
        assert_eq!(count(&mut b, 0), 0x9999, "0 is 10000");
    }

    #[test]
    fn latches_and_read_back() {
        let mut b = bench();
        program(&mut b, 0, 2, 1000);
        b.out8(3, 0xe2);
        assert_eq!(b.in8(0), 0xf4, "status: OUT, null count, both bytes, mode 2");
        clocks(&mut b, 11);
        b.out8(3, 0xc2);
        clocks(&mut b, 100);
        b.out8(3, 0x00);
        assert_eq!(b.in8(0), 0xb4, "status first");
        assert_eq!(u16::from_le_bytes([b.in8(0), b.in8(0)]), 990, "then the count latched first");
        assert_eq!(u16::from_le_bytes([b.in8(0), b.in8(0)]), 890, "then the running one");
    }

    #[test]
    fn nsc_port_61() {
        let mut b = bench();
        b.write(1, 0, 1, 0xff);
        assert_eq!(b.read(1, 0, 1) & 0xcf, 0x0f);
        let first = b.read(1, 0, 1) & 0x10;
        clocks(&mut b, 18);
        assert_ne!(b.read(1, 0, 1) & 0x10, first, "refresh toggle");
    }
}
