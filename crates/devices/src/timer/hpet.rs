//! The high-precision event timer.
//!
//! Manual: Intel IA-PC HPET (High Precision Event Timers) Specification, revision 1.0a, October 2004.
//!
//! The counter is not stepped: it is virtual time in units of 10 ns. Only timers that may interrupt cost a timer of the machine.

use hyaline_device::state::{StateError, Value, ensure, from_value, to_value};
use hyaline_device::{Chip, Cx, Device, IoError, Limits, Ns, Register, Reset, us};
use serde::{Deserialize, Serialize};

/// The chip's head.
pub static CHIP: Chip = Chip {
    name: "hpet",
    title: "High-precision event timer (HPET)",
    manual: "IA-PC HPET specification 1.0a",
    modelled: "main counter of 64 bits at 100 MHz; three timers of 64 or 32 bits, one-shot and periodic, edge- and level-triggered; legacy \
        replacement: the 8254's and the clock's interrupts come in through `pit` and `rtc` and go out through `irq0` and `irq8`, or the timers' do.",
    not_modelled: "FSB delivery (the capability bit is 0).",
    deviations: "A write to a periodic comparator with Tn_VAL_SET_CNF sets the period too, so that one write is enough. Periodic interrupts come at most every \
        10 µs. After an edge `irq0` and `irq8` stay high until the next, as the 8259A wants an input to last until it is acknowledged; the `gsi` lines, \
        which go to an I/O APIC, are pulsed.",
    banks: &[&MMIO],
    outputs: &[
        "irq0", "irq8", "gsi0", "gsi1", "gsi2", "gsi3", "gsi4", "gsi5", "gsi6", "gsi7", "gsi8", "gsi9",
        "gsi10", "gsi11", "gsi12", "gsi13", "gsi14", "gsi15", "gsi16", "gsi17", "gsi18", "gsi19", "gsi20",
        "gsi21", "gsi22", "gsi23",
    ],
    inputs: &["pit", "rtc"],
};

hyaline_device::registers! {
    /// The memory-mapped registers.
    pub bank MMIO "mmio" Memory 0x400 {
        GCAP_ID   0x000 8 ro = 0x0098_9680_8086_a201, "HPET §2.3.4", "Capabilities and ID"
            { REV_ID 0..=7; NUM_TIM_CAP 8..=12; COUNT_SIZE_CAP 13; LEG_RT_CAP 15; VENDOR_ID 16..=31; CLK_PERIOD 32..=63 };
        GEN_CONF  0x010 8 rw = 0x0, "HPET §2.3.5", "General configuration" { ENABLE_CNF 0; LEG_RT_CNF 1; RESERVED 2..=63 ro };
        GINTR_STA 0x020 8 w1c = 0x0, "HPET §2.3.6", "Interrupt status of level-triggered timers" { T0 0; T1 1; T2 2; RESERVED 3..=63 ro };
        MAIN_CNT  0x0f0 8 rw = 0x0, "HPET §2.3.7", "Main counter";
        T0_CONF   0x100 8 rw = 0x0, "HPET §2.3.8", "Timer 0: configuration"
            { INT_TYPE 1 {1 "level"}; INT_ENB 2; PERIODIC 3; PER_INT_CAP 4 ro; SIZE_CAP 5 ro; VAL_SET 6; MODE32 8; INT_ROUTE 9..=13; FSB_EN 14 ro; FSB_CAP 15 ro;
              RESERVED 16..=31 ro; ROUTE_CAP 32..=63 ro };
        T0_COMP   0x108 8 rw = 0xffff_ffff_ffff_ffff, "HPET §2.3.9", "Timer 0: comparator";
        T0_FSB    0x110 8 ro = 0x0, "HPET §2.3.10", "Timer 0: FSB route";
        T1_CONF   0x120 8 rw = 0x0, "HPET §2.3.8", "Timer 1: configuration"
            { INT_TYPE 1 {1 "level"}; INT_ENB 2; PERIODIC 3; PER_INT_CAP 4 ro; SIZE_CAP 5 ro; VAL_SET 6; MODE32 8; INT_ROUTE 9..=13; FSB_EN 14 ro; FSB_CAP 15 ro;
              RESERVED 16..=31 ro; ROUTE_CAP 32..=63 ro };
        T1_COMP   0x128 8 rw = 0xffff_ffff_ffff_ffff, "HPET §2.3.9", "Timer 1: comparator";
        T1_FSB    0x130 8 ro = 0x0, "HPET §2.3.10", "Timer 1: FSB route";
        T2_CONF   0x140 8 rw = 0x0, "HPET §2.3.8", "Timer 2: configuration"
            { INT_TYPE 1 {1 "level"}; INT_ENB 2; PERIODIC 3; PER_INT_CAP 4 ro; SIZE_CAP 5 ro; VAL_SET 6; MODE32 8; INT_ROUTE 9..=13; FSB_EN 14 ro; FSB_CAP 15 ro;
              RESERVED 16..=31 ro; ROUTE_CAP 32..=63 ro };
        T2_COMP   0x148 8 rw = 0xffff_ffff_ffff_ffff, "HPET §2.3.9", "Timer 2: comparator";
        T2_FSB    0x150 8 ro = 0x0, "HPET §2.3.10", "Timer 2: FSB route";
    }
}

/// Nanoseconds of one tick of the main counter.
pub const TICK: Ns = 10;
/// Number of timers.
pub const TIMERS: usize = 3;

const LEAST_PERIOD: Ns = us(10);

// Tn_CONF.
const LEVEL: u64 = 1 << 1;
const ENABLE: u64 = 1 << 2;
const PERIODIC: u64 = 1 << 3;
const VAL_SET: u64 = 1 << 6;
const MODE32: u64 = 1 << 8;
/// Periodic and 64-bit capable.
const CAPABILITIES: u64 = 1 << 4 | 1 << 5;
// GEN_CONF.
const RUN: u64 = 1;
const LEGACY: u64 = 2;

/// First of the `gsi` outputs.
const GSI: u32 = 2;

/// One timer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timer {
    /// Configuration, writable bits.
    pub config: u64,
    /// Comparator.
    pub comparator: u64,
    /// What a periodic timer adds at a match.
    pub period: u64,
    /// Tick of virtual time at which the counter next equals the comparator; None: never, or the counter stands.
    pub due: Option<u64>,
}

impl Timer {
    fn mask(&self) -> u64 {
        if self.config & MODE32 != 0 { 0xffff_ffff } else { u64::MAX }
    }
    fn periodic(&self) -> bool {
        self.config & PERIODIC != 0
    }

    /// Works out `due` after something was written.
    fn aim(&mut self, counter: Option<u64>, tick: u64) {
        self.due = counter.and_then(|c| tick.checked_add(self.comparator.wrapping_sub(c) & self.mask()));
    }

    /// Goes past all matches up to `tick`. True if there were any.
    fn look(&mut self, tick: u64) -> bool {
        let Some(due) = self.due.filter(|d| *d <= tick) else { return false };
        let period = self.period & self.mask();
        self.due = if self.periodic() && period != 0 {
            let n = (tick - due) / period + 1;
            self.comparator = self.comparator.wrapping_add(n.wrapping_mul(period)) & self.mask();
            n.checked_mul(period).and_then(|d| due.checked_add(d))
        } else if self.config & MODE32 != 0 {
            // The low half of the counter comes round again.
            let n = (tick - due) >> 32;
            due.checked_add((n + 1) << 32)
        } else {
            None
        };
        true
    }
}

/// What is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// General configuration.
    pub config: u64,
    /// Interrupt status.
    pub status: u64,
    /// The main counter while it stands; while it runs, what it is ahead of virtual time in ticks (modulo 2^64).
    pub counter: u64,
    /// The timers.
    pub timers: [Timer; TIMERS],
    /// Levels of the inputs `pit` and `rtc`.
    pub inputs: [bool; 2],
    /// Levels of all outputs, bit by bit.
    pub lines: u32,
    /// Levels that edges left on `irq0` and `irq8`.
    pub edges: [bool; 2],
    /// When the machine's timer was set to come due.
    pub armed: Option<Ns>,
}

impl State {
    fn new(inputs: [bool; 2]) -> State {
        let timer = || Timer { config: 0, comparator: u64::MAX, period: 0, due: None };
        State {
            config: 0,
            status: 0,
            counter: 0,
            timers: [timer(), timer(), timer()],
            inputs,
            lines: 0,
            edges: [false; 2],
            armed: None,
        }
    }

    /// May a restored file hold this?
    ///
    /// # Errors
    /// Reserved bits are set.
    pub fn check(&self) -> Result<(), StateError> {
        ensure(self.config < 4 && self.status < 8 && self.lines >> 26 == 0, || {
            "HPET: reserved bits are set".to_string()
        })?;
        ensure(self.timers.iter().all(|t| t.config & !T0_CONF.write_mask() == 0), || {
            "HPET: reserved bits of a timer's configuration are set".to_string()
        })?;
        ensure(self.config & RUN != 0 || self.timers.iter().all(|t| t.due.is_none()), || {
            "HPET: a timer is due while the counter stands".to_string()
        })
    }

    /// The running counter; None while it stands.
    fn running(&self, tick: u64) -> Option<u64> {
        (self.config & RUN != 0).then(|| tick.wrapping_add(self.counter))
    }
    fn counter(&self, tick: u64) -> u64 {
        self.running(tick).unwrap_or(self.counter)
    }

    /// Goes past all matches up to `tick`: sets status bits, gives the timers that had one.
    fn look(&mut self, tick: u64) -> [bool; TIMERS] {
        let mut matched = [false; TIMERS];
        for (n, t) in self.timers.iter_mut().enumerate() {
            matched[n] = t.look(tick);
            if matched[n] && t.config & LEVEL != 0 {
                self.status |= 1 << n;
            }
        }
        matched
    }

    /// The output that timer `n` drives (§2.3.8, Tn_INT_ROUTE_CNF; §2.3.5, LEG_RT_CNF). None: routed to a pin it has no way to.
    fn pin(&self, n: usize, routes: u32) -> Option<u32> {
        if self.config & LEGACY != 0 && n < 2 {
            return Some(n as u32);
        }
        let route = (self.timers[n].config >> 9 & 31) as u32;
        (route < 24 && routes >> route & 1 != 0).then_some(GSI + route)
    }

    /// Levels of all outputs now.
    fn levels(&self, routes: u32) -> u32 {
        let legacy = self.config & LEGACY != 0;
        let from = if legacy { self.edges } else { self.inputs };
        let mut levels = u32::from(from[0]) | u32::from(from[1]) << 1;
        for n in 0..TIMERS {
            let t = &self.timers[n];
            let up = t.config & (LEVEL | ENABLE) == LEVEL | ENABLE && self.status >> n & 1 != 0;
            if let Some(pin) = self.pin(n, routes).filter(|_| up) {
                levels |= 1 << pin;
            }
        }
        levels
    }

    fn get(&self, offset: u64, tick: u64, routes: u32) -> Option<u64> {
        let n = (offset.wrapping_sub(0x100) / 0x20) as usize;
        Some(match offset {
            0x000 => GCAP_ID.reset,
            0x010 => self.config,
            0x020 => self.status,
            0x0f0 => self.counter(tick),
            0x100..0x160 => {
                let t = &self.timers[n];
                match offset & 0x18 {
                    0x00 => t.config | CAPABILITIES | u64::from(routes) << 32,
                    0x08 => t.comparator,
                    0x10 => 0,
                    _ => return None,
                }
            }
            _ => return None,
        })
    }
}

/// The event timer.
#[derive(Debug)]
pub struct Hpet {
    state: State,
    routes: u32,
}

impl Hpet {
    /// An event timer whose timers can reach the I/O APIC inputs of the bits of `routes` (Tn_INT_ROUTE_CAP; bits 24 to 31 are ignored).
    pub fn new(routes: u32) -> Hpet {
        Hpet { state: State::new([false; 2]), routes: routes & 0xff_ffff }
    }

    /// Passes matches, brings the lines to their levels, sets the machine's timer (not before `earliest`).
    fn update(&mut self, earliest: Ns, cx: &mut Cx<'_>) {
        let tick = cx.now() / TICK;
        let s = &mut self.state;
        let matched = s.look(tick);
        let mut pulses = Vec::new();
        for n in (0..TIMERS).filter(|n| matched[*n]) {
            let edge = s.timers[n].config & (LEVEL | ENABLE) == ENABLE;
            match s.pin(n, self.routes).filter(|_| edge) {
                Some(pin) if pin < GSI => {
                    s.edges[n] = true;
                    if s.lines >> pin & 1 != 0 {
                        // An edge needs the line low first.
                        cx.line(pin).set(false);
                        s.lines &= !(1 << pin);
                    }
                }
                Some(pin) => pulses.push(pin),
                None => {}
            }
        }
        for n in 0..2 {
            let t = &s.timers[n];
            if s.config & LEGACY == 0 || t.config & ENABLE == 0 || t.config & LEVEL != 0 {
                s.edges[n] = false;
            }
        }
        let levels = s.levels(self.routes);
        for pin in (0..26).filter(|p| (levels ^ s.lines) >> p & 1 != 0) {
            cx.line(pin).set(levels >> pin & 1 != 0);
        }
        s.lines = levels;
        for pin in pulses.into_iter().filter(|p| levels >> p & 1 == 0) {
            cx.line(pin).pulse();
        }
        let due = s.timers.iter().filter(|t| t.config & ENABLE != 0).filter_map(|t| t.due).min();
        let at = due.and_then(|d| d.checked_mul(TICK)).map(|t| t.max(earliest));
        if at != s.armed {
            s.armed = at;
            match at {
                Some(t) => cx.at(0, t),
                None => cx.cancel(0),
            }
        }
    }

    fn set(&mut self, offset: u64, value: u64, lanes: u64, cx: &mut Cx<'_>) -> Result<(), IoError> {
        let tick = cx.now() / TICK;
        let s = &mut self.state;
        let merged = |old: u64| old & !lanes | value & lanes;
        match offset {
            0x010 => {
                let new = merged(s.config) & 3;
                let counter = s.counter(tick);
                if (new ^ s.config) & RUN != 0 {
                    s.counter = if new & RUN != 0 { counter.wrapping_sub(tick) } else { counter };
                }
                s.config = new;
                let running = s.running(tick);
                s.timers.iter_mut().for_each(|t| t.aim(running, tick));
            }
            0x020 => s.status &= !(value & lanes),
            0x0f0 => {
                let new = merged(s.counter(tick));
                if s.config & RUN != 0 {
                    cx.guest_error("HPET: the main counter is written while it runs");
                    s.counter = new.wrapping_sub(tick);
                } else {
                    s.counter = new;
                }
                let running = s.running(tick);
                s.timers.iter_mut().for_each(|t| t.aim(running, tick));
            }
            0x100..0x160 => {
                let n = ((offset - 0x100) / 0x20) as usize;
                let running = s.running(tick);
                let status = &mut s.status;
                let t = &mut s.timers[n];
                match offset & 0x18 {
                    0x00 => {
                        let old = t.config;
                        t.config = merged(old) & T0_CONF.write_mask();
                        if t.config & !old & MODE32 != 0 {
                            t.comparator &= 0xffff_ffff;
                            t.period &= 0xffff_ffff;
                        }
                        if t.config & LEVEL == 0 {
                            // "If set to edge-triggered, this bit should be ignored"; it then reads as 0 (§2.3.6).
                            *status &= !(1 << n);
                        }
                        if (t.config ^ old) & MODE32 != 0 {
                            t.aim(running, tick);
                        }
                        let route = (t.config >> 9 & 31) as u32;
                        if t.config & ENABLE != 0
                            && s.config & LEGACY == 0
                            && self.routes.checked_shr(route).unwrap_or(0) & 1 == 0
                        {
                            cx.guest_error(format_args!(
                                "HPET: timer {n} has no way to I/O APIC input {route}"
                            ));
                        }
                    }
                    0x08 => {
                        let m = t.mask();
                        if t.periodic() {
                            t.period = merged(t.period) & m;
                        }
                        if !t.periodic() || t.config & VAL_SET != 0 {
                            t.comparator = merged(t.comparator) & m;
                            t.aim(running, tick);
                        }
                        t.config &= !VAL_SET;
                    }
                    _ => return Err(IoError::ReadOnly),
                }
            }
            0x000 => return Err(IoError::ReadOnly),
            _ => return Err(IoError::NotHere),
        }
        Ok(())
    }
}

impl Device for Hpet {
    fn chip(&self) -> &'static Chip {
        &CHIP
    }

    fn limits(&self, _bank: usize) -> Limits {
        Limits::sizes(1, 8).implemented(4, 8)
    }

    fn read(&mut self, _bank: usize, offset: u64, size: u8, cx: &mut Cx<'_>) -> Result<u64, IoError> {
        let tick = cx.now() / TICK;
        // Looking must not change anything, so a copy goes past the matches.
        let mut s = self.state.clone();
        s.look(tick);
        let value = s.get(offset & !7, tick, self.routes).ok_or(IoError::NotHere)?;
        Ok(if size == 8 { value } else { value >> (8 * (offset & 7)) & 0xffff_ffff })
    }

    fn write(
        &mut self,
        _bank: usize,
        offset: u64,
        size: u8,
        value: u64,
        cx: &mut Cx<'_>,
    ) -> Result<(), IoError> {
        // What happened before the write comes first.
        self.update(0, cx);
        let shift = 8 * (offset & 4);
        let lanes = if size == 8 { u64::MAX } else { 0xffff_ffff << shift };
        let result = self.set(offset & !7, if size == 8 { value } else { value << shift }, lanes, cx);
        self.update(0, cx);
        result
    }

    fn register(&self, _bank: usize, offset: u64, _is_write: bool) -> Option<&'static Register> {
        MMIO.registers.iter().find(|r| r.offset == offset & !7)
    }

    fn peek(&self, _bank: usize, register: &Register) -> Option<u64> {
        if register.offset == MAIN_CNT.offset && self.state.config & RUN != 0 {
            return None;
        }
        self.state.get(register.offset, 0, self.routes)
    }

    fn timer(&mut self, _timer: u32, cx: &mut Cx<'_>) {
        self.state.armed = None;
        let earliest = cx.now().saturating_add(LEAST_PERIOD);
        self.update(earliest, cx);
    }

    fn input(&mut self, pin: u32, level: bool, cx: &mut Cx<'_>) {
        if let Some(i) = self.state.inputs.get_mut(pin as usize) {
            *i = level;
            let levels = self.state.levels(self.routes);
            if (levels ^ self.state.lines) >> pin & 1 != 0 {
                self.state.lines ^= 1 << pin;
                cx.line(pin).set(level);
            }
        }
    }

    fn reset(&mut self, _kind: Reset, cx: &mut Cx<'_>) {
        self.state = State::new(self.state.inputs);
        self.state.lines = self.state.levels(self.routes);
        cx.cancel(0);
        for pin in 0..26 {
            cx.line(pin).set(self.state.lines >> pin & 1 != 0);
        }
    }

    fn save(&self) -> Result<Value, StateError> {
        to_value(&self.state)
    }

    fn load(&mut self, state: &Value, cx: &mut Cx<'_>) -> Result<(), StateError> {
        let state: State = from_value(state)?;
        state.check()?;
        self.state = state;
        match self.state.armed {
            Some(t) => cx.at(0, t),
            None => cx.cancel(0),
        }
        Ok(())
    }

    fn as_any(&mut self) -> Option<&mut dyn std::any::Any> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyaline_device::{Bench, ms};

    /// Input 2 and the four of PCI.
    const ROUTES: u32 = 0x00f0_0004;

    hyaline_device::device_laws!(Hpet::new(ROUTES));

    fn bench() -> Bench<Hpet> {
        Bench::new(Hpet::new(ROUTES))
    }
    fn w(b: &mut Bench<Hpet>, offset: u64, v: u64) {
        b.write(0, offset, 8, v);
    }

    #[test]
    fn main_counter_2_3_7() {
        let mut b = bench();
        assert_eq!(b.read(0, 4, 4), 10_000_000, "10 ns in femtoseconds");
        b.run(ms(1));
        assert_eq!(b.read(0, 0xf0, 8), 0);
        w(&mut b, 0xf0, 5);
        w(&mut b, 0x10, 1);
        b.run(us(1));
        assert_eq!(b.read(0, 0xf0, 8), 105);
        w(&mut b, 0x10, 0);
        b.run(us(1));
        assert_eq!(b.read(0, 0xf0, 8), 105);
        b.write(0, 0xf4, 4, 7);
        assert_eq!(b.read(0, 0xf0, 8), 7 << 32 | 105);
    }

    #[test]
    fn one_shot_edge() {
        let mut b = bench();
        w(&mut b, 0x140, ENABLE | 2 << 9);
        w(&mut b, 0x148, 100);
        w(&mut b, 0x10, 1);
        b.run(us(1) - 1);
        assert_eq!(b.rises(GSI + 2), 0);
        b.run(1);
        assert_eq!(b.rises(GSI + 2), 1);
        assert!(!b.level(GSI + 2));
        b.run(ms(5));
        assert_eq!(b.rises(GSI + 2), 0);
        assert_eq!(b.next_timer(), None, "64 bits don't come round");
        assert_eq!(b.read(0, 0x20, 8), 0, "no status for edges");
    }

    #[test]
    fn level_triggered_2_3_6() {
        let mut b = bench();
        w(&mut b, 0x120, LEVEL | ENABLE | 20 << 9);
        w(&mut b, 0x128, 10);
        w(&mut b, 0x10, 1);
        b.run(us(1));
        assert!(b.level(GSI + 20));
        assert_eq!(b.read(0, 0x20, 8), 2);
        b.write(0, 0x20, 4, 2);
        assert!(!b.level(GSI + 20));
    }

    #[test]
    fn periodic_2_3_9() {
        let mut b = bench();
        w(&mut b, 0x100, ENABLE | PERIODIC | VAL_SET | MODE32 | 2 << 9);
        w(&mut b, 0x10, 1);
        w(&mut b, 0x108, 50_000);
        w(&mut b, 0x108, 100_000);
        b.run(ms(10));
        assert_eq!(b.rises(GSI + 2), 10, "0.5 ms, then every ms");
        assert_eq!(b.read(0, 0x108, 8), 1_050_000);
    }

    #[test]
    fn mode_32_comes_round() {
        let mut b = bench();
        w(&mut b, 0x100, ENABLE | MODE32 | 2 << 9);
        w(&mut b, 0x108, 100);
        w(&mut b, 0x10, 1);
        b.run((1 << 32) * TICK + us(2));
        assert_eq!(b.rises(GSI + 2), 2);
    }

    #[test]
    fn legacy_replacement_2_3_5() {
        let mut b = bench();
        b.input(0, true);
        assert!(b.level(0), "the 8254 comes through");
        w(&mut b, 0x100, ENABLE);
        w(&mut b, 0x108, 1000);
        w(&mut b, 0x10, 3);
        assert!(!b.level(0));
        b.rises(0);
        b.run(us(20));
        assert_eq!(b.rises(0), 1);
        assert!(b.level(0), "for the 8259A the line stays up");
        w(&mut b, 0x108, 5000);
        b.run(us(40));
        assert_eq!(b.rises(0), 1, "and falls before the next edge");
        b.input(0, false);
        w(&mut b, 0x10, 0);
        assert!(!b.level(0));
        b.input(1, true);
        assert!(b.level(1));
    }
}
