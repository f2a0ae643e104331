//! National Semiconductor PC16550D: the UART behind COM1 to COM4.
//!
//! The transmitter hands characters over at once and holds nothing, so THRE and TEMT always read as one and polled output
//! runs at full speed. Only the *interrupt* for an empty transmitter comes [`THRE_DELAY`] after the last write: a driver
//! that refills the FIFO from its interrupt handler then leaves the handler between two loads, as on the real chip, and
//! does not report a stuck interrupt.

use hyaline_device::state::{StateError, Value, ensure, from_value, to_value};
use hyaline_device::{Chip, Cx, Device, IoError, Limits, Ns, Register, Reset, SECOND, registers, us};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

registers! {
    /// The eight ports.
    pub bank PORTS "ports" Port 8 {
        RBR 0x0 1 ro = 0x00, "§8.0", "Receiver buffer: the oldest character received" !effect when "DLAB = 0, read";
        THR 0x0 1 wo = 0x00, "§8.0", "Transmitter holding register: a character to send" when "DLAB = 0, write";
        DLL 0x0 1 rw = 0x0c, "§8.3", "Divisor latch, low byte: 115200 baud divided by it" when "DLAB = 1";
        IER 0x1 1 rw = 0x00, "§8.7", "Interrupt enable" when "DLAB = 0" { ERBFI 0; ETBEI 1; ELSI 2; EDSSI 3; ZERO 4..=7 ro };
        DLM 0x1 1 rw = 0x00, "§8.3", "Divisor latch, high byte" when "DLAB = 1";
        IIR 0x2 1 ro = 0x01, "§8.6", "Interrupt identification; reading it ends a transmitter interrupt" !effect when "read" {
            ID 0..=3 { 0 "modem status", 1 "none", 2 "transmitter empty", 4 "data available", 6 "line status", 12 "character timeout" };
            FIFO 6..=7 { 0 "off", 3 "on" } };
        FCR 0x2 1 wo = 0x00, "§8.5", "FIFO control" when "write" {
            ENABLE 0; RCVR_RESET 1; XMIT_RESET 2; DMA_MODE 3;
            TRIGGER 6..=7 { 0 "1 byte", 1 "4 bytes", 2 "8 bytes", 3 "14 bytes" } };
        LCR 0x3 1 rw = 0x00, "§8.1", "Line control" {
            WLS 0..=1 { 0 "5 bits", 1 "6 bits", 2 "7 bits", 3 "8 bits" };
            STB 2; PEN 3; EPS 4; STICK 5; BREAK 6; DLAB 7 };
        MCR 0x4 1 rw = 0x00, "§8.8", "Modem control; OUT2 lets the interrupt through to the bus" { DTR 0; RTS 1; OUT1 2; OUT2 3; LOOP 4; ZERO 5..=7 ro };
        LSR 0x5 1 ro = 0x60, "§8.4", "Line status; reading it clears the error bits" !effect {
            DR 0; OE 1; PE 2; FE 3; BI 4; THRE 5; TEMT 6; RCVR_FIFO_ERROR 7 };
        MSR 0x6 1 ro = 0x00, "§8.9", "Modem status; reading it clears the change bits" !effect {
            DCTS 0; DDSR 1; TERI 2; DDCD 3; CTS 4; DSR 5; RI 6; DCD 7 };
        SCR 0x7 1 rw = 0x00, "§8.10", "Scratchpad";
    }
}

/// The chip's head.
pub static CHIP: Chip = Chip {
    name: "ns16550",
    title: "National Semiconductor PC16550D UART",
    manual: "PC16550D data sheet, National Semiconductor, June 1995 (TL/C/8652)",
    modelled: "All registers, both FIFO modes, receive trigger levels and character timeout, interrupt priorities, modem status with \
               its change bits, loopback, break reception, the PC's interrupt gate by OUT2.",
    not_modelled: "Waveforms: characters have no parity or framing errors of their own, DMA mode signals and the clock output.",
    deviations: "Characters leave when they are written, whatever the divisor says; the transmitter's interrupt comes 10 microseconds later. \
                 The divisor decides the receive timeout only.",
    banks: &[&PORTS],
    outputs: &["irq"],
    inputs: &["cts", "dsr", "ri", "dcd"],
};

/// From the last character written to the transmitter's interrupt.
pub const THRE_DELAY: Ns = us(10);
/// Depth of each FIFO in characters (§8.5).
pub const FIFO: usize = 16;
/// Input of the baud generator in hertz (§8.2): 16 times 115,200.
pub const CLOCK: u64 = 1_843_200;

/// Channel of the characters, both ways.
pub const DATA: u32 = 0;
/// Channel from the host on which every byte that comes means: the line was held in the break condition.
pub const BREAK: u32 = 1;

const TIMEOUT: u32 = 0;
const EMPTY: u32 = 1;

const OE: u8 = 0x02;
const FE: u8 = 0x08;
const BI: u8 = 0x10;
const ERRORS: u8 = 0x1e;
const DLAB: u8 = 0x80;
const LOOP: u8 = 0x10;
const OUT2: u8 = 0x08;
const ETBEI: u8 = 0x02;

/// The chip's state.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    divisor: u16,
    /// Characters received, oldest first, each with its error bits.
    received: VecDeque<(u8, u8)>,
    /// What the receiver buffer shows when nothing is waiting.
    rbr: u8,
    /// Error bits of LSR that wait to be read.
    errors: u8,
    /// Change bits of MSR.
    changes: u8,
    /// Levels of CTS, DSR, RI and DCD as asserted (bits 0 to 3).
    modem: u8,
    /// The transmitter's interrupt is pending.
    empty: bool,
    /// The receiver's timeout interrupt is pending.
    timeout: bool,
    timeout_at: Option<Ns>,
    empty_at: Option<Ns>,
    /// The host was told to wait.
    full: bool,
    /// Level of the interrupt line.
    irq: bool,
}

impl Default for State {
    fn default() -> State {
        State {
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            scr: 0,
            divisor: 12,
            received: VecDeque::new(),
            rbr: 0,
            errors: 0,
            changes: 0,
            // Someone who listens is at the other end of the cable: CTS, DSR and DCD are on.
            modem: 0b1011,
            empty: false,
            timeout: false,
            timeout_at: None,
            empty_at: None,
            full: false,
            irq: false,
        }
    }
}

impl State {
    fn check(&self) -> Result<(), StateError> {
        ensure(self.received.len() <= self.depth(), || {
            format!("the receiver holds {} characters, more than its {}", self.received.len(), self.depth())
        })?;
        ensure(self.received.iter().all(|(_, e)| e & !ERRORS == 0) && self.errors & !ERRORS == 0, || {
            "unknown error bits of a received character".into()
        })?;
        let small =
            self.ier & 0xf0 | self.mcr & 0xe0 | self.changes & 0xf0 | self.modem & 0xf0 | self.fcr & 0x36;
        ensure(small == 0, || format!("reserved register bits are set: {small:#04x}"))
    }
    fn fifo(&self) -> bool {
        self.fcr & 1 != 0
    }
    fn depth(&self) -> usize {
        if self.fifo() { FIFO } else { 1 }
    }
    fn trigger(&self) -> usize {
        if self.fifo() { [1, 4, 8, 14][usize::from(self.fcr >> 6)] } else { 1 }
    }
    fn looped(&self) -> bool {
        self.mcr & LOOP != 0
    }
    /// Bits of a character that are sent (§8.1).
    fn mask(&self) -> u8 {
        0xff >> (3 - (self.lcr & 3))
    }
    /// Time of one character: start, data, parity and stop bits of 16 clocks times the divisor.
    fn character(&self) -> Ns {
        let bits =
            1 + 5 + u64::from(self.lcr & 3) + u64::from(self.lcr >> 3 & 1) + 1 + u64::from(self.lcr >> 2 & 1);
        bits * 16 * u64::from(self.divisor.max(1)) * SECOND / CLOCK
    }
    /// CTS, DSR, RI and DCD as the chip sees them: bits 0 to 3 (§8.8, bit 4: in loopback they follow the outputs).
    fn modem_seen(&self) -> u8 {
        if !self.looped() {
            return self.modem;
        }
        let m = self.mcr;
        m >> 1 & 1 | (m & 1) << 1 | m & 0b1100
    }
    fn lsr(&self) -> u8 {
        let waiting = u8::from(!self.received.is_empty());
        let bad = self.fifo() && self.received.iter().any(|(_, e)| *e != 0);
        waiting | self.errors | 0x60 | u8::from(bad) << 7
    }
    fn msr(&self) -> u8 {
        self.modem_seen() << 4 | self.changes
    }
    /// The interrupt of highest priority as in IIR's low four bits (§8.6, table V).
    fn cause(&self) -> u8 {
        if self.ier & 4 != 0 && self.errors != 0 {
            0x06
        } else if self.ier & 1 != 0 && self.received.len() >= self.trigger() {
            0x04
        } else if self.ier & 1 != 0 && self.timeout {
            0x0c
        } else if self.ier & ETBEI != 0 && self.empty {
            0x02
        } else if self.ier & 8 != 0 && self.changes != 0 {
            0x00
        } else {
            0x01
        }
    }
    fn iir(&self) -> u8 {
        self.cause() | if self.fifo() { 0xc0 } else { 0 }
    }
    /// Takes note of modem inputs that changed from `before` (§8.9).
    fn modem_changed(&mut self, before: u8) {
        let now = self.modem_seen();
        let changed = before ^ now;
        // Of the ring indicator only the trailing edge counts.
        self.changes |= changed & 0b1011 | changed & before & 0b0100;
    }
    /// A character arrives at the shift register.
    fn arrive(&mut self, byte: u8, errors: u8) {
        if self.received.len() >= self.depth() {
            self.errors |= OE;
            if self.fifo() {
                return;
            }
            self.received.clear();
        }
        self.received.push_back((byte, errors));
        if self.received.len() == 1 {
            self.reveal();
        }
    }
    /// Error bits belong to the character at the top of the FIFO (§8.4).
    fn reveal(&mut self) {
        self.errors |= self.received.front().map_or(0, |(_, e)| *e);
    }
    fn forget_received(&mut self) {
        self.received.clear();
        self.timeout = false;
    }
}

/// The UART.
#[derive(Debug)]
pub struct Ns16550 {
    s: State,
    gate: bool,
}

impl Default for Ns16550 {
    fn default() -> Ns16550 {
        Ns16550::new()
    }
}

impl Ns16550 {
    /// A UART wired as on a PC: the interrupt reaches the bus only while OUT2 is on.
    pub fn new() -> Ns16550 {
        Ns16550 { s: State::default(), gate: true }
    }
    /// The same with the interrupt wired straight to the bus, for guests that leave OUT2 off.
    pub fn ungated(mut self) -> Ns16550 {
        self.gate = false;
        self
    }

    fn update(&mut self, cx: &mut Cx<'_>) {
        // In loopback OUT2 is off outside, whatever the register says (§8.8).
        let open = !self.gate || self.s.mcr & (OUT2 | LOOP) == OUT2;
        let level = open && self.s.cause() != 0x01;
        if level != self.s.irq {
            self.s.irq = level;
            cx.line(0).set(level);
        }
    }
    fn arm(&mut self, timer: u32, at: Option<Ns>, cx: &mut Cx<'_>) {
        let slot = if timer == TIMEOUT { &mut self.s.timeout_at } else { &mut self.s.empty_at };
        if *slot != at {
            *slot = at;
            match at {
                Some(at) => cx.at(timer, at),
                None => cx.cancel(timer),
            }
        }
    }
    /// Restarts the timeout of four characters (§8.11), or stops it when nothing waits.
    fn restart_timeout(&mut self, cx: &mut Cx<'_>) {
        let waits = self.s.fifo() && !self.s.received.is_empty();
        let at = waits.then(|| cx.now() + 4 * self.s.character());
        self.arm(TIMEOUT, at, cx);
    }
    fn room(&mut self, cx: &mut Cx<'_>) {
        if self.s.full && self.s.received.len() < self.s.depth() && !self.s.looped() {
            self.s.full = false;
            cx.ready(DATA);
        }
    }
    fn transmit(&mut self, byte: u8, cx: &mut Cx<'_>) {
        let byte = byte & self.s.mask();
        if self.s.looped() {
            self.s.arrive(byte, 0);
            self.restart_timeout(cx);
        } else {
            cx.send(DATA, &[byte]);
        }
        // While nobody waits for the interrupt it need not be timed: enabling it makes it pending anyway.
        self.s.empty = self.s.ier & ETBEI == 0;
        let at = (!self.s.empty).then(|| cx.now() + THRE_DELAY);
        self.arm(EMPTY, at, cx);
    }
    fn set_fcr(&mut self, value: u8, cx: &mut Cx<'_>) {
        let toggled = (value ^ self.s.fcr) & 1 != 0;
        if toggled || value & 2 != 0 {
            self.s.forget_received();
        }
        if toggled || value & 4 != 0 {
            // The transmitter holds nothing; an emptied one asks for more.
            self.s.empty = true;
            self.arm(EMPTY, None, cx);
        }
        // The other bits are programmed only together with ENABLE (§8.5, bit 0).
        self.s.fcr = if value & 1 != 0 { value & 0xc9 } else { 0 };
        self.restart_timeout(cx);
        self.room(cx);
    }
}

impl Device for Ns16550 {
    fn chip(&self) -> &'static Chip {
        &CHIP
    }
    fn limits(&self, _bank: usize) -> Limits {
        Limits::sizes(1, 4).with_unaligned().implemented(1, 1)
    }
    fn register(&self, _bank: usize, offset: u64, is_write: bool) -> Option<&'static Register> {
        let dlab = self.s.lcr & DLAB != 0;
        let name = match (offset, dlab, is_write) {
            (0, true, _) => "DLL",
            (0, false, false) => "RBR",
            (0, false, true) => "THR",
            (1, true, _) => "DLM",
            (1, false, _) => "IER",
            (2, _, false) => "IIR",
            (2, _, true) => "FCR",
            _ => return PORTS.at(offset, is_write),
        };
        PORTS.named(name)
    }
    fn peek(&self, _bank: usize, register: &Register) -> Option<u64> {
        let s = &self.s;
        let [dll, dlm] = s.divisor.to_le_bytes();
        Some(u64::from(match register.name {
            "RBR" => s.received.front().map_or(s.rbr, |(b, _)| *b),
            "DLL" => dll,
            "DLM" => dlm,
            "IER" => s.ier,
            "IIR" => s.iir(),
            "FCR" => s.fcr,
            "LCR" => s.lcr,
            "MCR" => s.mcr,
            "LSR" => s.lsr(),
            "MSR" => s.msr(),
            "SCR" => s.scr,
            _ => return None,
        }))
    }

    fn read(&mut self, _bank: usize, offset: u64, _size: u8, cx: &mut Cx<'_>) -> Result<u64, IoError> {
        let dlab = self.s.lcr & DLAB != 0;
        let [dll, dlm] = self.s.divisor.to_le_bytes();
        let value = match offset {
            0 if dlab => dll,
            0 => {
                if let Some((byte, _)) = self.s.received.pop_front() {
                    self.s.rbr = byte;
                    self.s.timeout = false;
                    self.s.reveal();
                    self.restart_timeout(cx);
                    self.room(cx);
                    self.update(cx);
                }
                self.s.rbr
            }
            1 if dlab => dlm,
            1 => self.s.ier,
            2 => {
                let iir = self.s.iir();
                if iir & 0x0f == 0x02 {
                    self.s.empty = false;
                    self.update(cx);
                }
                iir
            }
            3 => self.s.lcr,
            4 => self.s.mcr,
            5 => {
                let lsr = self.s.lsr();
                self.s.errors = 0;
                if let Some(top) = self.s.received.front_mut() {
                    // Told once: the mark of the character at the top goes with it.
                    top.1 = 0;
                }
                self.update(cx);
                lsr
            }
            6 => {
                let msr = self.s.msr();
                self.s.changes = 0;
                self.update(cx);
                msr
            }
            7 => self.s.scr,
            _ => return Err(IoError::NotHere),
        };
        Ok(u64::from(value))
    }

    fn write(
        &mut self,
        _bank: usize,
        offset: u64,
        _size: u8,
        value: u64,
        cx: &mut Cx<'_>,
    ) -> Result<(), IoError> {
        let value = value as u8;
        let dlab = self.s.lcr & DLAB != 0;
        match offset {
            0 if dlab => self.s.divisor = self.s.divisor & 0xff00 | u16::from(value),
            0 => self.transmit(value, cx),
            1 if dlab => self.s.divisor = self.s.divisor & 0x00ff | u16::from(value) << 8,
            1 => {
                let raised = value & !self.s.ier;
                self.s.ier = value & 0x0f;
                if raised & ETBEI != 0 {
                    // The holding register is empty: the interrupt comes at once (§8.7, bit 1).
                    self.s.empty = true;
                    self.arm(EMPTY, None, cx);
                }
            }
            2 => self.set_fcr(value, cx),
            3 => {
                if (value ^ self.s.lcr) & 0x40 != 0 {
                    cx.note(if value & 0x40 != 0 { "break on" } else { "break off" });
                }
                self.s.lcr = value;
            }
            4 => {
                let before = self.s.modem_seen();
                self.s.mcr = value & 0x1f;
                self.s.modem_changed(before);
                self.room(cx);
            }
            5 => cx.guest_error(format_args!(
                "LSR is for factory tests only; the write of {value:#04x} is ignored (§8.4)"
            )),
            6 => {}
            7 => self.s.scr = value,
            _ => return Err(IoError::NotHere),
        }
        self.update(cx);
        Ok(())
    }

    fn timer(&mut self, timer: u32, cx: &mut Cx<'_>) {
        if timer == TIMEOUT {
            self.s.timeout_at = None;
            self.s.timeout = self.s.fifo() && !self.s.received.is_empty();
        } else {
            self.s.empty_at = None;
            self.s.empty = true;
        }
        self.update(cx);
    }

    fn input(&mut self, pin: u32, level: bool, cx: &mut Cx<'_>) {
        if pin < 4 {
            let before = self.s.modem_seen();
            self.s.modem = self.s.modem & !(1 << pin) | u8::from(level) << pin;
            self.s.modem_changed(before);
            self.update(cx);
        }
    }

    fn receive(&mut self, channel: u32, data: &[u8], cx: &mut Cx<'_>) -> usize {
        let looped = self.s.looped();
        let taken = match channel {
            // In loopback the input pin is cut off (§8.8, bit 4): characters wait outside rather than get lost.
            DATA if looped => 0,
            DATA => {
                let n = data.len().min(self.s.depth() - self.s.received.len());
                let mask = self.s.mask();
                data.iter().take(n).for_each(|b| self.s.arrive(b & mask, 0));
                n
            }
            BREAK => {
                if !looped && !data.is_empty() {
                    // A break is taken for a null character whose stop bit is missing (§8.4, bits 3 and 4).
                    self.s.arrive(0, BI | FE);
                }
                data.len()
            }
            _ => 0,
        };
        if channel == DATA && taken < data.len() {
            self.s.full = true;
        }
        if taken > 0 {
            self.restart_timeout(cx);
            self.update(cx);
        }
        taken
    }

    fn reset(&mut self, kind: Reset, cx: &mut Cx<'_>) {
        // A master reset leaves divisor and scratchpad as they are (table I); modem inputs belong to the outside.
        let old = std::mem::take(&mut self.s);
        self.s.modem = old.modem;
        self.s.full = old.full;
        if kind == Reset::System {
            (self.s.divisor, self.s.scr, self.s.rbr) = (old.divisor, old.scr, old.rbr);
        }
        cx.cancel(TIMEOUT);
        cx.cancel(EMPTY);
        cx.line(0).set(false);
        self.room(cx);
    }

    fn save(&self) -> Result<Value, StateError> {
        to_value(&self.s)
    }
    fn load(&mut self, state: &Value, cx: &mut Cx<'_>) -> Result<(), StateError> {
        let s: State = from_value(state)?;
        s.check()?;
        self.s = s;
        for (timer, at) in [(TIMEOUT, self.s.timeout_at), (EMPTY, self.s.empty_at)] {
            if let Some(at) = at {
                cx.at(timer, at);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyaline_device::{Bench, Effect, device_laws};

    device_laws!(Ns16550::new());

    fn bench() -> Bench<Ns16550> {
        let mut b = Bench::new(Ns16550::new());
        b.out8(3, 0x83);
        b.out8(0, 1);
        b.out8(1, 0);
        b.out8(3, 0x03);
        b.out8(4, 0x0b);
        b
    }

    #[test]
    fn divisor_latch_hides_data_and_interrupt_enable() {
        let mut b = bench();
        assert_eq!(b.device.register(0, 0, true).map(|r| r.name), Some("THR"));
        b.out8(3, 0x80);
        assert_eq!(b.device.register(0, 0, true).map(|r| r.name), Some("DLL"));
        b.out8(0, 0x34);
        b.out8(1, 0x12);
        assert_eq!((b.in8(0), b.in8(1)), (0x34, 0x12));
        b.out8(3, 0x03);
        assert_eq!((b.in8(0), b.in8(1)), (0, 0));
    }

    #[test]
    fn characters_leave_at_once_cut_to_the_word_length() {
        let mut b = bench();
        b.out8(0, b'A');
        assert_eq!(b.in8(5), 0x60);
        for (lcr, sent) in [(0, 0x1f), (1, 0x3f), (2, 0x7f), (3, 0xff)] {
            b.out8(3, lcr);
            b.out8(0, 0xff);
            assert_eq!(b.sent(0).last(), Some(&sent), "LCR {lcr}");
        }
    }

    #[test]
    fn transmitter_interrupt_once_per_load() {
        let mut b = bench();
        b.out8(2, 0x01);
        b.out8(1, 0x02);
        assert!(b.level(0), "enabled while empty");
        assert_eq!(b.in8(2), 0xc2);
        assert!(!b.level(0), "reading IIR ends it");
        assert_eq!(b.in8(2), 0xc1);
        (0..16).for_each(|i| b.out8(0, i));
        assert!(!b.level(0));
        b.run(THRE_DELAY);
        assert!(b.level(0));
        assert_eq!(b.in8(2), 0xc2);
        b.run(us(1000));
        assert!(!b.level(0), "no more until more is sent");
        b.out8(1, 0x00);
        b.out8(1, 0x02);
        assert!(b.level(0), "enabling again asks again");
    }

    #[test]
    fn trigger_level_and_character_timeout() {
        let mut b = bench();
        b.out8(2, 0x81);
        b.out8(1, 0x01);
        assert_eq!(b.receive(0, b"1234567"), 7);
        assert!(!b.level(0), "seven are below the trigger of eight");
        // Four characters of ten bits at 115,200 baud: 347 microseconds.
        b.run(us(347));
        assert!(!b.level(0));
        b.run(us(1));
        assert_eq!((b.level(0), b.in8(2)), (true, 0xcc));
        assert_eq!(b.in8(0), b'1');
        assert!(!b.level(0), "a read starts the timeout anew");
        assert_eq!(b.receive(0, b"89"), 2);
        assert_eq!(b.in8(2), 0xc4);
        assert_eq!(b.in8(0), b'2');
        assert!(!b.level(0), "below the trigger");
    }

    #[test]
    fn host_waits_when_the_receiver_is_full() {
        let mut b = bench();
        assert_eq!(b.receive(0, b"ab"), 1);
        assert_eq!(b.in8(0), b'a');
        assert!(b.last.contains(&Effect::Ready { channel: 0 }));
        b.out8(2, 0x01);
        assert_eq!(b.receive(0, &[7; 20]), 16);
        assert_eq!(b.in8(5) & 0x02, 0, "nothing was lost");
    }

    #[test]
    fn loopback_overruns_and_modem_lines() {
        let mut b = bench();
        b.out8(4, 0x1f);
        assert_eq!(b.in8(6), 0xf4 & 0xf0, "all four lines on; RI rising makes no trailing edge");
        b.out8(4, 0x1a);
        assert_eq!(b.in8(6), 0x90 | 0x06, "DSR and RI went away");
        b.out8(0, 1);
        b.out8(0, 2);
        assert_eq!(b.in8(5) & 0x03, 0x03, "overrun");
        assert_eq!(b.in8(0), 2, "without a FIFO the new one replaces the old");
        b.out8(2, 0x01);
        (0..20).for_each(|i| b.out8(0, i));
        assert_eq!(b.in8(5) & 0x03, 0x03);
        let all: Vec<u8> = (0..16).map(|_| b.in8(0)).collect();
        assert_eq!(all, (0..16).collect::<Vec<u8>>(), "with a FIFO the new ones are lost");
        assert!(b.sent(0).is_empty(), "nothing left the chip");
    }

    #[test]
    fn priorities_and_errors_at_the_top_of_the_fifo() {
        let mut b = bench();
        b.out8(2, 0x01);
        b.out8(1, 0x0f);
        b.in8(2);
        b.receive(0, b"x");
        b.receive(BREAK, &[1]);
        b.input(0, false);
        assert_eq!(b.in8(2), 0xc4);
        assert_eq!(b.in8(5), 0x61 | 0x80, "the break is not at the top yet");
        assert_eq!(b.in8(0), b'x');
        assert_eq!(b.in8(2), 0xc6);
        assert_eq!(b.in8(5), 0xf9);
        assert_eq!(b.in8(5), 0x61);
        assert_eq!(b.in8(0), 0);
        b.out8(0, 1);
        b.run(THRE_DELAY);
        assert_eq!(b.in8(2), 0xc2);
        assert_eq!(b.in8(2), 0xc0);
        assert_eq!(b.in8(6), 0xa1);
        assert_eq!(b.in8(2), 0xc1);
        assert!(!b.level(0));
    }

    #[test]
    fn out2_gates_the_interrupt() {
        let mut b = bench();
        b.out8(1, 0x02);
        assert!(b.level(0));
        b.out8(4, 0x03);
        assert!(!b.level(0));
        let mut b = Bench::new(Ns16550::new().ungated());
        b.out8(1, 0x02);
        assert!(b.level(0));
    }

    #[test]
    fn a_bad_state_is_refused() {
        let mut b = bench();
        let mut s = b.device.s.clone();
        s.received = (0..17).map(|i| (i, 0)).collect();
        let value = to_value(&s).unwrap();
        let error = b.call(|d, cx| d.load(&value, cx)).unwrap_err();
        assert_eq!(error.to_string(), "the receiver holds 17 characters, more than its 1");
    }
}
