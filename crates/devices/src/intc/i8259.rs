//! The 8259A pair of a PC, with the edge/level control registers of its south bridge.
//!
//! Manual: Intel 8259A Programmable Interrupt Controller, order number 231468-003; for ELCR1 and ELCR2: Intel 82371SB (PIIX3), order
//! number 290550, "Interrupt controller registers".
//!
//! The two controllers are one device: the cascade (the slave's INT on the master's IR2, CAS0-2 between them) stays inside.

use hyaline_device::state::{StateError, Value, ensure, from_value, to_value};
use hyaline_device::{Chip, Cx, Device, IoError, Limits, Register, Reset};
use serde::{Deserialize, Serialize};

/// The chip's head.
pub static CHIP: Chip = Chip {
    name: "i8259",
    title: "Intel 8259A pair, programmable interrupt controllers",
    manual: "Intel 8259A data sheet (231468-003); ELCR: Intel 82371SB PIIX3 (290550)",
    modelled: "both controllers and their cascade; ICW1-ICW4; fully nested, special fully nested, special mask, automatic EOI, rotation, \
        specific and non-specific EOI, poll; edge and level triggering by ELCR; spurious IR7 of either controller. The request of an \
        edge-triggered input goes away when the input falls before the acknowledge, as the data sheet says.",
    not_modelled: "MCS-80/85 mode (ICW4.uPM = 0): the controller then answers as in 8086 mode and the guest error is reported; \
        buffered mode and a slave elsewhere than on IR2 have no effect.",
    deviations: "ICW1.LTIM is stored and has no effect, as in the PIIX, where ELCR decides per input. Reading a command port before any OCW3 \
        gives IRR, as the data sheet says.",
    banks: &[&MASTER, &SLAVE, &ELCR],
    outputs: &["intr"],
    inputs: &[
        "irq0", "irq1", "irq2", "irq3", "irq4", "irq5", "irq6", "irq7", "irq8", "irq9", "irq10", "irq11",
        "irq12", "irq13", "irq14", "irq15",
    ],
};

macro_rules! ports {
    ($module:ident, $bank:ident, $name:literal) => {
        /// Registers of one controller.
        pub mod $module {
            hyaline_device::registers! {
                /// The two ports of one controller.
                pub bank $bank $name Port 2 {
                    IRR  0x0 1 ro = 0x00, "8259A, interrupt request register", "Requests that wait" when "OCW3.RIS = 0";
                    ISR  0x0 1 ro = 0x00, "8259A, in-service register", "Requests in service" when "OCW3.RIS = 1";
                    POLL 0x0 1 ro = 0x00, "8259A, poll command", "Acknowledges and gives the level" !effect when "after OCW3.P = 1"
                        { LEVEL 0..=2; INT 7 };
                    ICW1 0x0 1 wo = 0x00, "8259A, initialization command words 1 and 2", "Starts initialization" when "bit 4 = 1"
                        { IC4 0; SNGL 1; ADI 2; LTIM 3; INIT 4; VECTOR_85 5..=7 };
                    OCW2 0x0 1 wo = 0x00, "8259A, operation control word 2", "End of interrupt, rotation" when "bits 4-3 = 00"
                        { LEVEL 0..=2; COMMAND 5..=7 {0 "rotate in AEOI off", 1 "non-specific EOI", 2 "no operation", 3 "specific EOI",
                          4 "rotate in AEOI on", 5 "rotate on non-specific EOI", 6 "set priority", 7 "rotate on specific EOI"} };
                    OCW3 0x0 1 wo = 0x00, "8259A, operation control word 3", "Read select, poll, special mask" when "bits 4-3 = 01"
                        { RIS 0; RR 1; P 2; MARK 3; SMM 5; ESMM 6 };
                    IMR  0x1 1 rw = 0x00, "8259A, operation control word 1", "Mask: ones inhibit inputs";
                    ICW2 0x1 1 wo = 0x00, "8259A, initialization command words 1 and 2", "Vector of IR0" when "after ICW1"
                        { BASE 3..=7 };
                    ICW3 0x1 1 wo = 0x00, "8259A, initialization command word 3", "Cascade: inputs with slaves, or slave's ID"
                        when "after ICW2, ICW1.SNGL = 0";
                    ICW4 0x1 1 wo = 0x00, "8259A, initialization command word 4", "Modes" when "after ICW3, ICW1.IC4 = 1"
                        { UPM 0 {1 "8086"}; AEOI 1; MS 2; BUF 3; SFNM 4 };
                }
            }
        }
    };
}

ports!(master, MASTER_PORTS, "master");
ports!(slave, SLAVE_PORTS, "slave");
use master::MASTER_PORTS as MASTER;
use slave::SLAVE_PORTS as SLAVE;

hyaline_device::registers! {
    /// Edge or level, input by input.
    pub bank ELCR "elcr" Port 2 {
        ELCR1 0x0 1 rw = 0x00, "PIIX3, ELCR1", "Ones: IRQ0-7 level-triggered. IRQ0, 1 and 2 are always edge-triggered"
            { IRQ0 0 ro; IRQ1 1 ro; IRQ2 2 ro; IRQ3 3; IRQ4 4; IRQ5 5; IRQ6 6; IRQ7 7 };
        ELCR2 0x1 1 rw = 0x00, "PIIX3, ELCR2", "Ones: IRQ8-15 level-triggered. IRQ8 and 13 are always edge-triggered"
            { IRQ8 0 ro; IRQ9 1; IRQ10 2; IRQ11 3; IRQ12 4; IRQ13 5 ro; IRQ14 6; IRQ15 7 };
    }
}

/// The input of the master that the slave is on.
const CASCADE: u8 = 2;

/// Which initialization word the controller waits for at its second port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Awaits {
    /// None: a write is OCW1.
    Ocw1,
    /// ICW2.
    Icw2,
    /// ICW3.
    Icw3,
    /// ICW4.
    Icw4,
}

/// One 8259A.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Controller {
    /// Levels of the inputs.
    pub level: u8,
    /// Edges latched and not yet acknowledged.
    pub edge: u8,
    /// Inputs that are level-triggered.
    pub elcr: u8,
    /// In-service register.
    pub isr: u8,
    /// Mask register.
    pub imr: u8,
    /// Input of the lowest priority; 7 unless rotated.
    pub lowest: u8,
    /// What the second port takes next.
    pub awaits: Awaits,
    /// ICW1 as written.
    pub icw1: u8,
    /// ICW2 without its low three bits.
    pub vector: u8,
    /// ICW3 as written.
    pub icw3: u8,
    /// ICW4 as written, or 0.
    pub icw4: u8,
    /// Rotate in automatic EOI mode.
    pub rotate: bool,
    /// Special mask mode.
    pub special_mask: bool,
    /// Reads of the first port give ISR.
    pub read_isr: bool,
    /// The next read is a poll.
    pub poll: bool,
}

impl Controller {
    fn new() -> Controller {
        Controller {
            level: 0,
            edge: 0,
            elcr: 0,
            isr: 0,
            imr: 0,
            lowest: 7,
            awaits: Awaits::Ocw1,
            icw1: 0,
            vector: 0,
            icw3: 0,
            icw4: 0,
            rotate: false,
            special_mask: false,
            read_isr: false,
            poll: false,
        }
    }

    fn check(&self) -> Result<(), StateError> {
        ensure(self.lowest < 8, || {
            format!("8259A: the lowest priority is on input {}, there are 8", self.lowest)
        })?;
        ensure(self.vector & 7 == 0, || {
            format!("8259A: vector base {:#x} is not a multiple of 8", self.vector)
        })?;
        ensure(self.edge & !self.level == 0, || "8259A: an edge is latched on a low input".to_string())
    }

    /// The interrupt request register: latched edges and active levels.
    fn irr(&self) -> u8 {
        (self.edge & !self.elcr) | (self.level & self.elcr)
    }

    fn set_input(&mut self, n: u8, level: bool) {
        let bit = 1 << n;
        if level {
            self.edge |= bit & !self.level;
            self.level |= bit;
        } else {
            self.edge &= !bit;
            self.level &= !bit;
        }
    }

    /// The input of the highest priority in `set`, with its rank (0 is the highest).
    fn highest(&self, set: u8) -> Option<(u8, u8)> {
        let first = (self.lowest + 1) & 7;
        let rotated = set.rotate_right(u32::from(first));
        (rotated != 0).then(|| {
            let rank = rotated.trailing_zeros() as u8;
            ((first + rank) & 7, rank)
        })
    }

    /// The input that INT is raised for now ("Fully nested mode", "Special mask mode", "Special fully nested mode").
    fn requested(&self, is_master: bool) -> Option<u8> {
        let (n, rank) = self.highest(self.irr() & !self.imr)?;
        let mut serving = self.isr;
        if self.special_mask {
            serving &= !self.imr;
        }
        if is_master && self.icw4 & 0x10 != 0 && n == CASCADE {
            // A slave in service does not lock out its own higher requests.
            serving &= !(1 << CASCADE);
        }
        match self.highest(serving) {
            Some((_, busy)) if busy <= rank => None,
            _ => Some(n),
        }
    }

    /// INTA: the request moves into service. With nothing there, IR7 is answered and no bit set ("Interrupt sequence").
    fn acknowledge(&mut self, is_master: bool) -> (u8, bool) {
        let Some(n) = self.requested(is_master) else { return (7, false) };
        let bit = 1 << n;
        self.edge &= !bit;
        if self.icw4 & 2 != 0 {
            if self.rotate {
                self.lowest = n;
            }
        } else {
            self.isr |= bit;
        }
        (n, true)
    }

    /// Removes the highest from service; in special mask mode masked ones are skipped ("End of interrupt").
    fn non_specific_eoi(&mut self) -> Option<u8> {
        let set = if self.special_mask { self.isr & !self.imr } else { self.isr };
        let (n, _) = self.highest(set)?;
        self.isr &= !(1 << n);
        Some(n)
    }

    fn read_first(&mut self, is_master: bool) -> u8 {
        if self.poll {
            self.poll = false;
            let (n, real) = self.acknowledge(is_master);
            return if real { 0x80 | n } else { 0 };
        }
        if self.read_isr { self.isr } else { self.irr() }
    }

    fn write_first(&mut self, v: u8, cx: &mut Cx<'_>) {
        if v & 0x10 != 0 {
            // ICW1: "the following automatically occur": edge sense reset, IMR cleared, IR7 lowest, special mask off, read IRR.
            self.edge = 0;
            self.imr = 0;
            self.isr = 0;
            self.lowest = 7;
            self.special_mask = false;
            self.read_isr = false;
            self.poll = false;
            self.rotate = false;
            self.icw1 = v;
            if v & 1 == 0 {
                self.icw4 = 0;
                cx.guest_error(format_args!(
                    "8259A: ICW1 {v:#04x} asks for no ICW4, so for MCS-80/85 mode, which a PC can't use"
                ));
            }
            self.awaits = Awaits::Icw2;
        } else if v & 8 != 0 {
            if v & 0x40 != 0 {
                self.special_mask = v & 0x20 != 0;
            }
            if v & 4 != 0 {
                self.poll = true;
            } else if v & 2 != 0 {
                self.read_isr = v & 1 != 0;
            }
        } else {
            let n = v & 7;
            match v >> 5 {
                0 => self.rotate = false,
                1 => {
                    self.non_specific_eoi();
                }
                3 => self.isr &= !(1 << n),
                4 => self.rotate = true,
                5 => {
                    if let Some(n) = self.non_specific_eoi() {
                        self.lowest = n;
                    }
                }
                6 => self.lowest = n,
                7 => {
                    self.isr &= !(1 << n);
                    self.lowest = n;
                }
                _ => {}
            }
        }
    }

    fn write_second(&mut self, v: u8, cx: &mut Cx<'_>) {
        let icw4 = if self.icw1 & 1 != 0 { Awaits::Icw4 } else { Awaits::Ocw1 };
        self.awaits = match self.awaits {
            Awaits::Ocw1 => {
                self.imr = v;
                Awaits::Ocw1
            }
            Awaits::Icw2 => {
                self.vector = v & 0xf8;
                if self.icw1 & 2 == 0 { Awaits::Icw3 } else { icw4 }
            }
            Awaits::Icw3 => {
                self.icw3 = v;
                icw4
            }
            Awaits::Icw4 => {
                self.icw4 = v;
                if v & 1 == 0 {
                    cx.guest_error(format_args!(
                        "8259A: ICW4 {v:#04x} asks for MCS-80/85 mode, which a PC can't use"
                    ));
                }
                Awaits::Ocw1
            }
        };
    }

    fn peek(&self, r: &Register) -> Option<u64> {
        Some(u64::from(match r.name {
            "IRR" => self.irr(),
            "ISR" => self.isr,
            "IMR" => self.imr,
            "ICW1" => self.icw1,
            "ICW2" => self.vector,
            "ICW3" => self.icw3,
            "ICW4" => self.icw4,
            _ => return None,
        }))
    }

    fn register(&self, regs: &'static [Register], offset: u64, is_write: bool) -> Option<&'static Register> {
        let name = match (offset, is_write) {
            (0, false) if self.poll => "POLL",
            (0, false) if self.read_isr => "ISR",
            (0, false) => "IRR",
            // Which command word it is depends on the value; OCW2 (EOI) is what is written there nearly always.
            (0, true) => "OCW2",
            (1, false) => "IMR",
            (1, true) => match self.awaits {
                Awaits::Ocw1 => "IMR",
                Awaits::Icw2 => "ICW2",
                Awaits::Icw3 => "ICW3",
                Awaits::Icw4 => "ICW4",
            },
            _ => return None,
        };
        regs.iter().find(|r| r.name == name)
    }
}

/// What is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The controller with IRQ0-7.
    pub master: Controller,
    /// The controller with IRQ8-15.
    pub slave: Controller,
    /// Level of the INTR line.
    pub intr: bool,
}

impl State {
    /// May a restored file hold this?
    ///
    /// # Errors
    /// An index out of range.
    pub fn check(&self) -> Result<(), StateError> {
        self.master.check()?;
        self.slave.check()?;
        ensure(self.master.elcr & 7 == 0 && self.slave.elcr & 0x21 == 0, || {
            "8259A: ELCR makes an input level-triggered that can't be".to_string()
        })
    }

    /// Puts the slave's INT onto the master's IR2 and gives the level of the master's.
    fn settle(&mut self) -> bool {
        let int = self.slave.requested(false).is_some();
        self.master.set_input(CASCADE, int);
        self.master.requested(true).is_some()
    }

    /// Both INTA cycles of the processor: the vector.
    fn acknowledge(&mut self) -> u8 {
        self.settle();
        let (n, real) = self.master.acknowledge(true);
        if real && n == CASCADE {
            let (n, _) = self.slave.acknowledge(false);
            // The slave's INT may stay up for a lower request: that is a new edge for the master.
            self.master.set_input(CASCADE, false);
            self.slave.vector | n
        } else {
            self.master.vector | n
        }
    }
}

/// The pair.
#[derive(Debug)]
pub struct I8259 {
    state: State,
}

impl Default for I8259 {
    fn default() -> Self {
        I8259::new()
    }
}

impl I8259 {
    /// A pair that nobody has initialized.
    pub fn new() -> I8259 {
        I8259 { state: State { master: Controller::new(), slave: Controller::new(), intr: false } }
    }

    /// Level of the INTR line now.
    pub fn intr(&self) -> bool {
        self.state.intr
    }

    fn update(&mut self, cx: &mut Cx<'_>) {
        let level = self.state.settle();
        if level != self.state.intr {
            self.state.intr = level;
            cx.line(0).set(level);
        }
    }
}

impl Device for I8259 {
    fn chip(&self) -> &'static Chip {
        &CHIP
    }

    fn limits(&self, _bank: usize) -> Limits {
        Limits::DEFAULT.implemented(1, 1)
    }

    fn read(&mut self, bank: usize, offset: u64, _size: u8, cx: &mut Cx<'_>) -> Result<u64, IoError> {
        let s = &mut self.state;
        let value = match (bank, offset) {
            (0, 0) => s.master.read_first(true),
            (0, 1) => s.master.imr,
            (1, 0) => s.slave.read_first(false),
            (1, 1) => s.slave.imr,
            (2, 0) => s.master.elcr,
            (2, 1) => s.slave.elcr,
            _ => return Err(IoError::NotHere),
        };
        self.update(cx);
        Ok(u64::from(value))
    }

    fn write(
        &mut self,
        bank: usize,
        offset: u64,
        _size: u8,
        value: u64,
        cx: &mut Cx<'_>,
    ) -> Result<(), IoError> {
        let (s, v) = (&mut self.state, value as u8);
        match (bank, offset) {
            (0, 0) => s.master.write_first(v, cx),
            (0, 1) => s.master.write_second(v, cx),
            (1, 0) => s.slave.write_first(v, cx),
            (1, 1) => s.slave.write_second(v, cx),
            (2, 0) => s.master.elcr = ELCR1.write(0, value) as u8,
            (2, 1) => s.slave.elcr = ELCR2.write(0, value) as u8,
            _ => return Err(IoError::NotHere),
        }
        self.update(cx);
        Ok(())
    }

    fn register(&self, bank: usize, offset: u64, is_write: bool) -> Option<&'static Register> {
        match bank {
            0 => self.state.master.register(MASTER.registers, offset, is_write),
            1 => self.state.slave.register(SLAVE.registers, offset, is_write),
            _ => ELCR.at(offset, is_write),
        }
    }

    fn peek(&self, bank: usize, register: &Register) -> Option<u64> {
        match (bank, register.offset) {
            (0, _) => self.state.master.peek(register),
            (1, _) => self.state.slave.peek(register),
            (_, 0) => Some(u64::from(self.state.master.elcr)),
            _ => Some(u64::from(self.state.slave.elcr)),
        }
    }

    fn input(&mut self, pin: u32, level: bool, cx: &mut Cx<'_>) {
        match pin {
            // IR2 belongs to the slave.
            2 => return,
            0..8 => self.state.master.set_input(pin as u8, level),
            8..16 => self.state.slave.set_input(pin as u8 - 8, level),
            _ => return,
        }
        self.update(cx);
    }

    fn acknowledge(&mut self, cx: &mut Cx<'_>) -> Option<u8> {
        let vector = self.state.acknowledge();
        self.update(cx);
        Some(vector)
    }

    fn reset(&mut self, _kind: Reset, cx: &mut Cx<'_>) {
        for c in [&mut self.state.master, &mut self.state.slave] {
            // The devices behind the inputs are reset too; until they say so the levels stand.
            *c = Controller { level: c.level, ..Controller::new() };
        }
        self.state.intr = false;
        self.state.settle();
        self.state.intr = self.state.master.requested(true).is_some();
        cx.line(0).set(self.state.intr);
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

    hyaline_device::device_laws!(I8259::new());

    /// Initialized as a PC's firmware does: vectors 0x20 and 0x28, nothing masked.
    fn pc() -> Bench<I8259> {
        let mut b = Bench::new(I8259::new());
        for (bank, icw) in [(0, [0x11, 0x20, 0x04, 0x01]), (1, [0x11, 0x28, 0x02, 0x01])] {
            b.write(bank, 0, 1, icw[0]);
            for v in &icw[1..] {
                b.write(bank, 1, 1, *v);
            }
        }
        b
    }

    fn ack(b: &mut Bench<I8259>) -> u8 {
        b.call(|d, cx| d.acknowledge(cx)).unwrap_or(0)
    }

    fn isr(b: &mut Bench<I8259>, bank: usize) -> u64 {
        b.write(bank, 0, 1, 0x0b);
        b.read(bank, 0, 1)
    }

    #[test]
    fn interrupt_sequence_and_non_specific_eoi() {
        let mut b = pc();
        b.input(0, true);
        assert!(b.level(0));
        assert_eq!(b.in8(0), 1, "IRR");
        assert_eq!(ack(&mut b), 0x20);
        assert!(!b.level(0));
        assert_eq!(isr(&mut b, 0), 1);
        b.input(1, true);
        assert!(!b.level(0), "IR1 waits for IR0");
        b.out8(0, 0x20);
        assert!(b.level(0));
        assert_eq!(ack(&mut b), 0x21);
    }

    #[test]
    fn cascade_acknowledges_both_controllers() {
        let mut b = pc();
        b.input(12, true);
        b.input(14, true);
        assert_eq!(ack(&mut b), 0x2c);
        assert_eq!((isr(&mut b, 0), isr(&mut b, 1)), (4, 0x10));
        b.write(1, 0, 1, 0x20);
        assert!(!b.level(0), "the master still has IR2 in service");
        b.write(0, 0, 1, 0x20);
        assert!(b.level(0));
        assert_eq!(ack(&mut b), 0x2e);
    }

    #[test]
    fn interrupt_sequence_spurious_ir7() {
        let mut b = pc();
        b.input(3, true);
        b.input(3, false);
        assert!(!b.level(0), "the input must stay up until the acknowledge");
        assert_eq!(ack(&mut b), 0x27);
        assert_eq!(isr(&mut b, 0), 0, "no bit is set for a spurious interrupt");
        // The slave's: its request goes away between the master's INTA and its own.
        b.input(10, true);
        b.device.state.slave.imr = 0xff;
        b.device.state.master.level |= 4;
        b.device.state.master.edge |= 4;
        let (n, real) = b.device.state.master.acknowledge(true);
        assert_eq!((n, real), (2, true));
        assert_eq!(b.device.state.slave.acknowledge(false), (7, false));
    }

    #[test]
    fn edge_and_level_inputs() {
        let mut b = pc();
        b.input(5, true);
        assert_eq!(ack(&mut b), 0x25);
        b.out8(0, 0x20);
        assert!(!b.level(0), "an edge counts once");
        b.input(5, false);
        b.write(2, 0, 1, 0xff);
        assert_eq!(b.read(2, 0, 1), 0xf8, "IRQ0-2 stay edge-triggered");
        b.write(2, 1, 1, 0xff);
        assert_eq!(b.read(2, 1, 1), 0xde);
        b.input(5, true);
        assert_eq!(ack(&mut b), 0x25);
        assert!(!b.level(0));
        b.out8(0, 0x65);
        assert!(b.level(0), "a level counts as long as it is up");
        b.input(5, false);
        assert!(!b.level(0));
    }

    #[test]
    fn ocw1_masks() {
        let mut b = pc();
        b.out8(1, 0x02);
        b.input(1, true);
        assert!(!b.level(0));
        assert_eq!(b.in8(0), 2, "a masked request shows in IRR");
        b.out8(1, 0);
        assert!(b.level(0));
    }

    #[test]
    fn ocw2_rotation() {
        let mut b = pc();
        b.input(0, true);
        ack(&mut b);
        b.out8(0, 0xa0);
        // IR0 is the lowest now.
        b.input(0, false);
        b.input(0, true);
        b.input(7, true);
        assert_eq!(ack(&mut b), 0x27);
        b.out8(0, 0x20);
        b.out8(0, 0xc4);
        b.input(4, true);
        b.input(5, true);
        assert_eq!(ack(&mut b), 0x25, "set priority: 4 lowest, 5 highest");
    }

    #[test]
    fn icw4_automatic_eoi() {
        let mut b = pc();
        for (o, v) in [(0, 0x11), (1, 0x20), (1, 4), (1, 3)] {
            b.out8(o, v);
        }
        b.input(6, true);
        assert_eq!(ack(&mut b), 0x26);
        assert_eq!(isr(&mut b, 0), 0);
    }

    #[test]
    fn ocw3_special_mask_mode() {
        let mut b = pc();
        b.input(3, true);
        ack(&mut b);
        b.input(6, true);
        assert!(!b.level(0));
        b.out8(1, 1 << 3);
        b.out8(0, 0x68);
        assert!(b.level(0), "only the masked level is inhibited");
        assert_eq!(ack(&mut b), 0x26);
        b.out8(0, 0x20);
        assert_eq!(isr(&mut b, 0), 1 << 3, "a masked in-service bit is not ended by a non-specific EOI");
    }

    #[test]
    fn icw4_special_fully_nested_mode() {
        let mut b = pc();
        for (o, v) in [(0, 0x11), (1, 0x20), (1, 4), (1, 0x11)] {
            b.out8(o, v);
        }
        b.input(12, true);
        assert_eq!(ack(&mut b), 0x2c);
        b.input(9, true);
        assert!(b.level(0), "a higher request of the slave gets through");
        assert_eq!(ack(&mut b), 0x29);
    }

    #[test]
    fn ocw3_poll() {
        let mut b = pc();
        b.input(4, true);
        b.out8(0, 0x0c);
        assert_eq!(b.in8(0), 0x84);
        assert!(!b.level(0));
        assert_eq!(isr(&mut b, 0), 0x10);
        b.out8(0, 0x0c);
        assert_eq!(b.in8(0) & 0x80, 0);
    }

    #[test]
    fn accesses_are_named_by_state() {
        let mut b = Bench::new(I8259::new());
        b.out8(0, 0x11);
        assert_eq!(b.device.register(0, 1, true).map(|r| r.name), Some("ICW2"));
        b.out8(1, 0x20);
        assert_eq!(b.device.register(0, 1, true).map(|r| r.name), Some("ICW3"));
    }
}
