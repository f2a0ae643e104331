//! The I/O APIC: 24 inputs that become messages to local APICs.
//!
//! Manual: Intel 82093AA I/O Advanced Programmable Interrupt Controller, order number 290566; the EOI register of version 0x20: Intel 82801
//! (ICH) data sheets, "I/O APIC, EOI register".

use hyaline_device::state::{StateError, Value, ensure, from_value, to_value};
use hyaline_device::{ApicMessage, Chip, Cx, Delivery, Device, IoError, Limits, Register, Reset};
use serde::{Deserialize, Serialize};

/// Number of inputs.
pub const PINS: usize = 24;

/// The chip's head.
pub static CHIP: Chip = Chip {
    name: "ioapic",
    title: "Intel 82093AA I/O APIC (version 0x20)",
    manual: "Intel 82093AA data sheet (290566); EOI register: Intel 82801 (ICH) data sheets",
    modelled: "24 redirection entries; edge and level triggering, both polarities, Remote IRR, masks, all delivery modes; EOI by message and by register.",
    not_modelled: "delivery status is always idle: messages arrive at once. The arbitration ID follows the APIC ID.",
    deviations: "The input lines are taken as asserted when high, whatever bit INTPOL says: the board's wires carry \"asserted\", not volts. \
        Version 0x20 with an EOI register, as in south bridges after the 82093AA, which has 0x11.",
    banks: &[&MMIO, &INDEXED],
    outputs: &[],
    inputs: &[
        "pin0", "pin1", "pin2", "pin3", "pin4", "pin5", "pin6", "pin7", "pin8", "pin9", "pin10", "pin11",
        "pin12", "pin13", "pin14", "pin15", "pin16", "pin17", "pin18", "pin19", "pin20", "pin21", "pin22",
        "pin23",
    ],
};

hyaline_device::registers! {
    /// The memory-mapped registers.
    pub bank MMIO "mmio" Memory 0x100 {
        IOREGSEL 0x00 4 rw = 0x0, "82093AA §3.1.1", "Index of the register seen in IOWIN" { INDEX 0..=7; RESERVED 8..=31 ro };
        IOWIN    0x10 4 rw = 0x0, "82093AA §3.1.2", "The indexed register";
        EOI      0x40 4 wo = 0x0, "82801, EOI register", "Ends the level-triggered interrupt of this vector" { VECTOR 0..=7 };
    }
}

/// A redirection entry's halves, for all 24 inputs.
macro_rules! entries {
    ($($low:ident $lo:literal $high:ident $hi:literal),* $(,)?) => {
        hyaline_device::registers! {
            /// The registers behind IOREGSEL.
            pub bank INDEXED "indexed" Indexed 0x40 {
                IOAPICID  0x00 4 rw = 0x0, "82093AA §3.2.1", "APIC ID" { RESERVED 0..=23 ro; ID 24..=27; RESERVED2 28..=31 ro };
                IOAPICVER 0x01 4 ro = 0x0017_0020, "82093AA §3.2.2", "Version and number of the last entry" { VERSION 0..=7; LAST 16..=23 };
                IOAPICARB 0x02 4 ro = 0x0, "82093AA §3.2.3", "Arbitration ID" { ID 24..=27 };
                $(
                $low  $lo 4 rw = 0x1_0000, "82093AA §3.2.4", "Redirection entry, low half"
                    { VECTOR 0..=7; MODE 8..=10 {0 "fixed", 1 "lowest priority", 2 "SMI", 4 "NMI", 5 "INIT", 7 "ExtINT"}; LOGICAL 11; PENDING 12 ro;
                      ACTIVE_LOW 13; REMOTE_IRR 14 ro; LEVEL 15; MASK 16; RESERVED 17..=31 ro };
                $high $hi 4 rw = 0x0, "82093AA §3.2.4", "Redirection entry, high half" { RESERVED 0..=23 ro; DESTINATION 24..=31 };
                )*
            }
        }
    };
}

entries!(
    REDIR0_LOW 0x10 REDIR0_HIGH 0x11, REDIR1_LOW 0x12 REDIR1_HIGH 0x13, REDIR2_LOW 0x14 REDIR2_HIGH 0x15,
    REDIR3_LOW 0x16 REDIR3_HIGH 0x17, REDIR4_LOW 0x18 REDIR4_HIGH 0x19, REDIR5_LOW 0x1a REDIR5_HIGH 0x1b,
    REDIR6_LOW 0x1c REDIR6_HIGH 0x1d, REDIR7_LOW 0x1e REDIR7_HIGH 0x1f, REDIR8_LOW 0x20 REDIR8_HIGH 0x21,
    REDIR9_LOW 0x22 REDIR9_HIGH 0x23, REDIR10_LOW 0x24 REDIR10_HIGH 0x25, REDIR11_LOW 0x26 REDIR11_HIGH 0x27,
    REDIR12_LOW 0x28 REDIR12_HIGH 0x29, REDIR13_LOW 0x2a REDIR13_HIGH 0x2b, REDIR14_LOW 0x2c REDIR14_HIGH 0x2d,
    REDIR15_LOW 0x2e REDIR15_HIGH 0x2f, REDIR16_LOW 0x30 REDIR16_HIGH 0x31, REDIR17_LOW 0x32 REDIR17_HIGH 0x33,
    REDIR18_LOW 0x34 REDIR18_HIGH 0x35, REDIR19_LOW 0x36 REDIR19_HIGH 0x37, REDIR20_LOW 0x38 REDIR20_HIGH 0x39,
    REDIR21_LOW 0x3a REDIR21_HIGH 0x3b, REDIR22_LOW 0x3c REDIR22_HIGH 0x3d, REDIR23_LOW 0x3e REDIR23_HIGH 0x3f,
);

const MASKED: u64 = 1 << 16;
const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;
/// Bits of an entry that software writes.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// What is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// IOREGSEL.
    pub index: u8,
    /// APIC ID, 0 to 15.
    pub id: u8,
    /// Redirection entries.
    pub entries: [u64; PINS],
    /// Levels of the inputs, bit by bit.
    pub levels: u32,
}

impl State {
    /// May a restored file hold this?
    ///
    /// # Errors
    /// Reserved bits are set.
    pub fn check(&self) -> Result<(), StateError> {
        ensure(self.id < 16 && self.levels >> PINS == 0, || {
            "I/O APIC: ID or inputs are out of range".to_string()
        })?;
        ensure(self.entries.iter().all(|e| e & !(WRITABLE | REMOTE_IRR) == 0), || {
            "I/O APIC: reserved bits of a redirection entry are set".to_string()
        })
    }

    /// Sends the interrupt of an input that is due: an edge, or a level that is not yet being served.
    fn serve(&mut self, n: usize, edge: bool, cx: &mut Cx<'_>) {
        let e = self.entries[n];
        if e & MASKED != 0 {
            return;
        }
        let level = e & LEVEL != 0;
        let due = if level { self.levels >> n & 1 != 0 && e & REMOTE_IRR == 0 } else { edge };
        if !due {
            return;
        }
        let mode = match e >> 8 & 7 {
            0 => Delivery::Fixed,
            1 => Delivery::LowestPriority,
            2 => Delivery::Smi,
            4 => Delivery::Nmi,
            5 => Delivery::Init,
            7 => Delivery::ExtInt,
            m => {
                cx.guest_error(format_args!("I/O APIC: input {n} has the reserved delivery mode {m}"));
                return;
            }
        };
        // SMI, NMI, INIT and ExtINT count as edges whatever LEVEL says (§3.2.4, delivery mode).
        let level = level && matches!(mode, Delivery::Fixed | Delivery::LowestPriority);
        if level {
            self.entries[n] |= REMOTE_IRR;
        } else if !edge {
            return;
        }
        cx.apic(ApicMessage::Deliver {
            destination: (e >> 56) as u32,
            logical: e & 1 << 11 != 0,
            mode,
            vector: e as u8,
            level,
            except: None,
        });
    }

    /// The EOI of a vector reached the I/O APIC.
    fn end(&mut self, vector: u8, cx: &mut Cx<'_>) {
        for n in 0..PINS {
            let e = self.entries[n];
            if e as u8 == vector && e & REMOTE_IRR != 0 {
                self.entries[n] &= !REMOTE_IRR;
                self.serve(n, false, cx);
            }
        }
    }

    fn indexed(&self, index: u8) -> Option<u32> {
        match index {
            0x00 | 0x02 => Some(u32::from(self.id) << 24),
            0x01 => Some(IOAPICVER.reset as u32),
            0x10..=0x3f => {
                let e = self.entries[usize::from(index - 0x10) / 2];
                Some(if index & 1 == 0 { e as u32 } else { (e >> 32) as u32 })
            }
            _ => None,
        }
    }

    fn set_indexed(&mut self, index: u8, v: u32, cx: &mut Cx<'_>) {
        match index {
            0x00 => self.id = (v >> 24 & 0xf) as u8,
            0x10..=0x3f => {
                let n = usize::from(index - 0x10) / 2;
                let old = self.entries[n];
                let new = if index & 1 == 0 {
                    old & !0xffff_ffff | u64::from(v)
                } else {
                    old & 0xffff_ffff | u64::from(v) << 32
                };
                let mut e = old & !WRITABLE | new & WRITABLE;
                if e & LEVEL == 0 {
                    // "For edge triggered interrupts this bit is undefined" (Remote IRR); software relies on its going away.
                    e &= !REMOTE_IRR;
                }
                self.entries[n] = e;
                self.serve(n, false, cx);
            }
            0x01 | 0x02 => cx.guest_error(format_args!("I/O APIC: register {index:#x} can't be written")),
            _ => cx.guest_error(format_args!("I/O APIC: there is no register {index:#x}")),
        }
    }
}

/// The I/O APIC.
#[derive(Debug)]
pub struct IoApic {
    state: State,
}

impl Default for IoApic {
    fn default() -> Self {
        IoApic::new()
    }
}

impl IoApic {
    /// An I/O APIC after power-on: everything masked.
    pub fn new() -> IoApic {
        IoApic { state: State { index: 0, id: 0, entries: [MASKED; PINS], levels: 0 } }
    }

    /// A redirection entry, for a board that hands routes to an accelerator. None past the last.
    pub fn entry(&self, pin: usize) -> Option<u64> {
        self.state.entries.get(pin).copied()
    }
}

impl Device for IoApic {
    fn chip(&self) -> &'static Chip {
        &CHIP
    }

    fn limits(&self, _bank: usize) -> Limits {
        Limits::DEFAULT.implemented(4, 4)
    }

    fn read(&mut self, bank: usize, offset: u64, _size: u8, cx: &mut Cx<'_>) -> Result<u64, IoError> {
        match (bank, offset) {
            (0, 0x00) => Ok(u64::from(self.state.index)),
            (0, 0x10) => {
                let index = self.state.index;
                if self.state.indexed(index).is_none() {
                    cx.guest_error(format_args!("I/O APIC: there is no register {index:#x}"));
                }
                Ok(u64::from(self.state.indexed(index).unwrap_or(0)))
            }
            (0, 0x40) => Err(IoError::WriteOnly),
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
        match (bank, offset) {
            (0, 0x00) => self.state.index = value as u8,
            (0, 0x10) => self.state.set_indexed(self.state.index, value as u32, cx),
            (0, 0x40) => self.state.end(value as u8, cx),
            _ => return Err(IoError::NotHere),
        }
        Ok(())
    }

    fn register(&self, bank: usize, offset: u64, is_write: bool) -> Option<&'static Register> {
        if bank == 0 && offset & !3 == IOWIN.offset {
            let index = u64::from(self.state.index);
            return INDEXED.registers.iter().find(|r| r.offset == index).or(Some(&IOWIN));
        }
        MMIO.at(offset, is_write)
    }

    fn peek(&self, bank: usize, register: &Register) -> Option<u64> {
        match (bank, register.offset) {
            (0, 0x00) => Some(u64::from(self.state.index)),
            (0, 0x10) => self.state.indexed(self.state.index).map(u64::from),
            (1, index) => self.state.indexed(index as u8).map(u64::from),
            _ => None,
        }
    }

    fn input(&mut self, pin: u32, level: bool, cx: &mut Cx<'_>) {
        let n = pin as usize;
        if n >= PINS {
            return;
        }
        let rose = level && self.state.levels >> n & 1 == 0;
        self.state.levels = self.state.levels & !(1 << n) | u32::from(level) << n;
        if rose {
            self.state.serve(n, true, cx);
        }
    }

    fn message(&mut self, message: &ApicMessage, cx: &mut Cx<'_>) -> bool {
        let ApicMessage::Eoi { vector } = *message else { return false };
        self.state.end(vector, cx);
        true
    }

    fn reset(&mut self, _kind: Reset, _cx: &mut Cx<'_>) {
        self.state = State { levels: self.state.levels, ..IoApic::new().state };
    }

    fn save(&self) -> Result<Value, StateError> {
        to_value(&self.state)
    }

    fn load(&mut self, state: &Value, _cx: &mut Cx<'_>) -> Result<(), StateError> {
        let state: State = from_value(state)?;
        state.check()?;
        self.state = state;
        Ok(())
    }

    fn as_any(&mut self) -> Option<&mut dyn std::any::Any> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyaline_device::Bench;

    hyaline_device::device_laws!(IoApic::new());

    fn set(b: &mut Bench<IoApic>, index: u64, v: u64) {
        b.write(0, 0, 4, index);
        b.write(0, 0x10, 4, v);
    }
    fn get(b: &mut Bench<IoApic>, index: u64) -> u64 {
        b.write(0, 0, 4, index);
        b.read(0, 0x10, 4)
    }

    #[test]
    fn identity_3_2() {
        let mut b = Bench::new(IoApic::new());
        assert_eq!(get(&mut b, 1), 0x0017_0020);
        set(&mut b, 0, 0xffff_ffff);
        assert_eq!((get(&mut b, 0), get(&mut b, 2)), (0x0f00_0000, 0x0f00_0000));
        assert_eq!(get(&mut b, 0x10), 0x1_0000, "masked after reset");
        assert_eq!(get(&mut b, 0x40), 0);
        assert_eq!(b.complaints.len(), 1);
    }

    #[test]
    fn edges_are_sent_once() {
        let mut b = Bench::new(IoApic::new());
        b.input(2, true);
        set(&mut b, 0x15, 0x0300_0000);
        set(&mut b, 0x14, 0x0931);
        assert!(b.messages.is_empty(), "no edge since it was unmasked");
        b.input(2, false);
        b.input(2, true);
        let want = ApicMessage::Deliver {
            destination: 3,
            logical: true,
            mode: Delivery::LowestPriority,
            vector: 0x31,
            level: false,
            except: None,
        };
        assert_eq!(b.messages, [want]);
    }

    #[test]
    fn levels_wait_for_the_eoi() {
        let mut b = Bench::new(IoApic::new());
        set(&mut b, 0x26, 0xa041);
        b.input(11, true);
        assert_eq!(b.messages.len(), 1);
        assert_eq!(get(&mut b, 0x26), 0xe041, "Remote IRR");
        b.input(11, false);
        b.input(11, true);
        assert_eq!(b.messages.len(), 1);
        b.call(|d, cx| d.message(&ApicMessage::Eoi { vector: 0x41 }, cx));
        assert_eq!(b.messages.len(), 2, "still up: sent again");
        b.input(11, false);
        b.write(0, 0x40, 4, 0x41);
        assert_eq!(b.messages.len(), 2);
        assert_eq!(get(&mut b, 0x26), 0xa041);
    }

    #[test]
    fn masking_keeps_a_level() {
        let mut b = Bench::new(IoApic::new());
        set(&mut b, 0x26, 0x1_8041);
        b.input(11, true);
        assert!(b.messages.is_empty());
        set(&mut b, 0x26, 0x8041);
        assert_eq!(b.messages.len(), 1);
    }

    #[test]
    fn the_window_is_named_by_the_index() {
        let mut b = Bench::new(IoApic::new());
        b.write(0, 0, 4, 0x12);
        assert_eq!(b.device.register(0, 0x10, true).map(|r| r.name), Some("REDIR1_LOW"));
    }
}
