//! The ISA bridge of the PIIX3.
//!
//! Manual: Intel 82371FB (PIIX) and 82371SB (PIIX3) PCI ISA IDE Xcelerator, order number 290550-002.
//!
//! The other functions and the parts inside (8259A pair, 8254, ports 61h and CF9h) are devices of their own. This one routes PCI's
//! interrupts to those of ISA.

use super::config::{self, ConfigSpace, ConfigState, HEADER_LEN, Identity, VIRTUAL_SUBSYSTEM, header};
use hyaline_device::state::{StateError, Value, ensure, from_value, to_value};
use hyaline_device::{Bank, Chip, Cx, Device, IoError, Limits, Place, Register, Reset};
use serde::{Deserialize, Serialize};

/// The chip's head.
pub static CHIP: Chip = Chip {
    name: "piix3",
    title: "Intel 82371SB (PIIX3) PCI to ISA bridge",
    manual: "Intel 82371SB data sheet (290550-002)",
    modelled: "function 0: routing of PIRQA#-PIRQD# to ISA interrupts; the other registers are stored.",
    not_modelled: "ISA timing, X-bus chip selects, DMA aliasing and type F, APIC chip select, system-management and clock throttling: stored, \
        without effect. Function 1 (IDE) and 2 (USB) are not there.",
    deviations: "The subsystem IDs are those of a virtual PC.",
    banks: &[&CONFIG],
    outputs: &[
        "irq0", "irq1", "irq2", "irq3", "irq4", "irq5", "irq6", "irq7", "irq8", "irq9", "irq10", "irq11",
        "irq12", "irq13", "irq14", "irq15",
    ],
    inputs: &["pirqa", "pirqb", "pirqc", "pirqd"],
};

/// What the bridge says of itself.
pub const IDENTITY: Identity = Identity {
    vendor: 0x8086,
    device: 0x7000,
    class: 0x06_0100,
    revision: 0x00,
    subsystem: VIRTUAL_SUBSYSTEM,
    pin: 0,
    multifunction: true,
};

hyaline_device::registers! {
    bank OWN "own" Config 256 {
        COMMAND 0x04 2 ro = 0x0007, "PIIX3, PCICMD", "Command" { IO 0; MEM 1; BUS_MASTER 2; SPECIAL_CYCLES 3 rw; SERR 8 rw };
        STATUS  0x06 2 ro = 0x0200, "PIIX3, PCISTS", "Status"
            { FAST_B2B_CAPABLE 7; DATA_PARITY 8; DEVSEL 9..=10 {1 "medium"}; SIGNALED_TARGET_ABORT 11 w1c; RECEIVED_TARGET_ABORT 12 w1c;
              RECEIVED_MASTER_ABORT 13 w1c; SIGNALED_SERR 14 w1c; DETECTED_PARITY 15 w1c };
        IORT    0x4c 1 rw = 0x4d, "PIIX3, IORT", "ISA I/O recovery timer";
        XBCS    0x4e 2 rw = 0x0003, "PIIX3, XBCS", "X-bus chip selects";
        PIRQRCA 0x60 1 rw = 0x80, "PIIX3, PIRQRC", "Route of PIRQA#" { IRQ 0..=3; RESERVED 4..=6 ro; OFF 7 };
        PIRQRCB 0x61 1 rw = 0x80, "PIIX3, PIRQRC", "Route of PIRQB#" { IRQ 0..=3; RESERVED 4..=6 ro; OFF 7 };
        PIRQRCC 0x62 1 rw = 0x80, "PIIX3, PIRQRC", "Route of PIRQC#" { IRQ 0..=3; RESERVED 4..=6 ro; OFF 7 };
        PIRQRCD 0x63 1 rw = 0x80, "PIIX3, PIRQRC", "Route of PIRQD#" { IRQ 0..=3; RESERVED 4..=6 ro; OFF 7 };
        TOM     0x69 1 rw = 0x02, "PIIX3, TOM", "Top of memory for ISA masters";
        MSTAT   0x6a 2 rw = 0x0000, "PIIX3, MSTAT", "Miscellaneous status";
        MBIRQ0  0x70 1 rw = 0x80, "PIIX3, MBIRQ", "Motherboard interrupt route 0";
        MBIRQ1  0x71 1 rw = 0x80, "PIIX3, MBIRQ", "Motherboard interrupt route 1";
        MBDMA0  0x76 1 rw = 0x04, "PIIX3, MBDMA", "Motherboard DMA control 0";
        MBDMA1  0x77 1 rw = 0x04, "PIIX3, MBDMA", "Motherboard DMA control 1";
        PCSC    0x78 2 rw = 0x0002, "PIIX3, PCSC", "Programmable chip select";
        APICBASE 0x80 1 rw = 0x00, "PIIX3, APICBASE", "I/O APIC base";
        DLC     0x82 1 rw = 0x00, "PIIX3, DLC", "Deterministic latency control";
        SMICNTL 0xa0 1 rw = 0x08, "PIIX3, SMICNTL", "SMI control";
        SMIEN   0xa2 2 rw = 0x0000, "PIIX3, SMIEN", "SMI enable";
        SEE     0xa4 4 rw = 0x0000, "PIIX3, SEE", "System event enable";
        FTMR    0xa8 1 rw = 0x0f, "PIIX3, FTMR", "Fast off timer";
        SMIREQ  0xaa 2 rw = 0x0000, "PIIX3, SMIREQ", "SMI request";
        CTLTMR  0xac 1 rw = 0x00, "PIIX3, CTLTMR", "Clock scale, STPCLK# low";
        CTHTMR  0xae 1 rw = 0x00, "PIIX3, CTHTMR", "Clock scale, STPCLK# high";
    }
}

const LEN: usize = HEADER_LEN + OWN.registers.len() - 2;

/// Configuration registers.
pub static CONFIG: Bank = Bank {
    name: "config",
    place: Place::Config,
    size: 256,
    registers: &header::<LEN>(&IDENTITY, &[], OWN.registers),
};

/// ISA interrupts that a PIRQ can be routed to (PIRQRC): 3-7, 9-12, 14, 15.
const ROUTABLE: u16 = 0b1101_1110_1111_1000;

/// What is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Levels of PIRQA# to PIRQD# (high: asserted).
    pub pirq: [bool; 4],
    /// Levels of the ISA interrupts that come of them, bit by bit.
    pub irq: u16,
    /// Configuration registers.
    pub config: ConfigState,
}

/// The ISA bridge.
#[derive(Debug)]
pub struct Piix3 {
    pirq: [bool; 4],
    irq: u16,
    config: ConfigSpace,
}

impl Default for Piix3 {
    fn default() -> Self {
        Piix3::new()
    }
}

impl Piix3 {
    /// An ISA bridge after reset.
    pub fn new() -> Piix3 {
        let mut config = ConfigSpace::new(&IDENTITY, &[]);
        OWN.registers.iter().for_each(|r| config.declare(r));
        Piix3 { pirq: [false; 4], irq: 0, config }
    }

    /// The ISA interrupt that PIRQ `n` (0 to 3) goes to; None if it is not routed.
    pub fn route(&self, n: usize) -> Option<u8> {
        let r = self.config.byte(0x60 + (n & 3));
        (r & 0x80 == 0 && ROUTABLE >> (r & 15) & 1 != 0).then_some(r & 15)
    }

    fn update(&mut self, cx: &mut Cx<'_>) {
        let asserted = (0..4).filter(|n| self.pirq[*n]).filter_map(|n| self.route(n));
        let now = asserted.fold(0u16, |irq, n| irq | 1 << n);
        let changed = now ^ self.irq;
        self.irq = now;
        // Lines that fall first: a moved route must not show two at once.
        for level in [false, true] {
            for n in (0..16).filter(|n| changed >> n & 1 != 0 && (now >> n & 1 != 0) == level) {
                cx.line(n).set(level);
            }
        }
    }
}

impl Device for Piix3 {
    fn chip(&self) -> &'static Chip {
        &CHIP
    }

    fn limits(&self, _bank: usize) -> Limits {
        config::LIMITS
    }

    fn read(&mut self, _bank: usize, offset: u64, size: u8, _cx: &mut Cx<'_>) -> Result<u64, IoError> {
        self.config.read(offset, size)
    }

    fn write(
        &mut self,
        _bank: usize,
        offset: u64,
        size: u8,
        value: u64,
        cx: &mut Cx<'_>,
    ) -> Result<(), IoError> {
        let written = self.config.write(offset, size, value, cx)?;
        if written.touches(0x60, 4) {
            for n in 0..4 {
                let r = self.config.byte(0x60 + n);
                if r & 0x80 == 0 && self.route(n).is_none() {
                    cx.guest_error(format_args!(
                        "PIIX3: PIRQ {n} can't be routed to the reserved interrupt {}",
                        r & 15
                    ));
                }
            }
            self.update(cx);
        }
        Ok(())
    }

    fn peek(&self, _bank: usize, register: &Register) -> Option<u64> {
        self.config.peek(register)
    }

    fn input(&mut self, pin: u32, level: bool, cx: &mut Cx<'_>) {
        if let Some(p) = self.pirq.get_mut(pin as usize) {
            *p = level;
            self.update(cx);
        }
    }

    fn reset(&mut self, _kind: Reset, cx: &mut Cx<'_>) {
        self.config.reset(cx);
        self.irq = 0;
        for n in 0..16 {
            cx.line(n).set(false);
        }
    }

    fn save(&self) -> Result<Value, StateError> {
        to_value(&State { pirq: self.pirq, irq: self.irq, config: self.config.save() })
    }

    fn load(&mut self, state: &Value, cx: &mut Cx<'_>) -> Result<(), StateError> {
        let s: State = from_value(state)?;
        ensure(s.irq & !ROUTABLE == 0, || format!("PIIX3: interrupts {:#x} can't come from PCI", s.irq))?;
        self.config.load(&s.config, cx)?;
        (self.pirq, self.irq) = (s.pirq, s.irq);
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

    hyaline_device::device_laws!(Piix3::new());

    #[test]
    fn pirqs_are_routed() {
        let mut b = Bench::new(Piix3::new());
        b.input(0, true);
        assert!((0..16).all(|n| !b.level(n)), "not routed after reset");
        b.write(0, 0x60, 4, 0x800b_0b0a);
        assert!(b.level(10));
        b.input(1, true);
        b.input(2, true);
        assert!(b.level(11));
        b.input(1, false);
        assert!(b.level(11), "PIRQC# shares it");
        b.input(2, false);
        assert!(!b.level(11));
        b.write(0, 0x60, 1, 0x05);
        assert!(!b.level(10) && b.level(5), "a route that moves");
        b.write(0, 0x60, 1, 0x80);
        assert!(!b.level(5));
    }

    #[test]
    fn reserved_interrupts_are_refused() {
        let mut b = Bench::new(Piix3::new());
        b.input(3, true);
        b.write(0, 0x63, 1, 8);
        assert_eq!(b.complaints.len(), 1);
        assert!(!b.level(8));
    }

    #[test]
    fn header() {
        let mut b = Bench::new(Piix3::new());
        assert_eq!(b.read(0, 0, 4), 0x7000_8086);
        assert_eq!(b.read(0, 8, 4), 0x0601_0000);
        assert_eq!(b.read(0, 0x0e, 1), 0x80, "it has other functions");
    }
}
