//! Power management as the PIIX4 has it: ACPI fixed hardware, a general-purpose event block, the SMI command port, the SMBus host controller.
//!
//! Manuals: Intel 82371AB (PIIX4), order number 290562-001, "Power management" and "SMBus"; Advanced Configuration and Power Interface
//! Specification 6.x, chapter 4 "ACPI hardware specification".

use crate::pci::config::{self, ConfigSpace, ConfigState, HEADER_LEN, Identity, VIRTUAL_SUBSYSTEM, header};
use crate::timer::PM as CLOCK;
use hyaline_device::state::{StateError, Value, ensure, from_value, to_value};
use hyaline_device::{Bank, Chip, Cx, Device, IoError, Limits, Place, Register, Request, Reset};
use serde::{Deserialize, Serialize};

/// The chip's head.
pub static CHIP: Chip = Chip {
    name: "piix4_pm",
    title: "Intel 82371AB (PIIX4) power management and SMBus",
    manual: "Intel 82371AB data sheet (290562-001); ACPI specification 6.x, chapter 4",
    modelled: "PM1 status, enable and control, the 24-bit PM timer at 3.579545 MHz, SCI, the power button, soft off (SLP_TYP 0), the general-purpose event block at \
        0Ch, the APM ports, an SMBus host controller with an empty bus.",
    not_modelled: "suspend to RAM or disk and power-on suspend (reported); processor clock control, device monitors, general-purpose I/O: stored, \
        without effect. SMBus slave functions. Interrupts of the SMBus.",
    deviations: "Without SMM, writing F1h or F0h to APMC switches SCI_EN as the SMI handler of a PC's firmware would, and APMC_EN is set from the start, by \
        which firmware sees that SMM needs no set-up. With SMM, a write to APMC pulses `smi` when APMC_EN is set.",
    banks: &[&PM, &APM, &SMBUS, &CONFIG],
    outputs: &["sci", "smi"],
    inputs: &["power_button"],
};

/// What the function says of itself.
pub const IDENTITY: Identity = Identity {
    vendor: 0x8086,
    device: 0x7113,
    class: 0x06_8000,
    revision: 0x03,
    subsystem: VIRTUAL_SUBSYSTEM,
    pin: 1,
    multifunction: false,
};

hyaline_device::registers! {
    /// The power-management ports, at PMBA.
    pub bank PM "pm" Port 64 {
        PMSTS   0x00 2 w1c = 0x0, "PIIX4, PMSTS; ACPI §4.8.3.1", "PM1 status"
            { TMROF 0; BUS_MASTER 4; GLOBAL 5; PWRBTN 8; RTC 10; RESUME 15 };
        PMEN    0x02 2 rw = 0x0, "PIIX4, PMEN; ACPI §4.8.3.1", "PM1 enable" { TMROF 0; RESERVED 1..=4 ro; GLOBAL 5; RESERVED2 6..=7 ro; PWRBTN 8; RESERVED3 9 ro; RTC 10;
            RESERVED4 11..=15 ro };
        PMCNTRL 0x04 2 rw = 0x0, "PIIX4, PMCNTRL; ACPI §4.8.3.2", "PM1 control"
            { SCI_EN 0; BM_RLD 1; GBL_RLS 2 ro; RESERVED 3..=9 ro; SUS_TYP 10..=12 {0 "soft off", 1 "suspend to RAM", 5 "working"}; SUS_EN 13 ro; RESERVED2 14..=15 ro };
        PMTMR   0x08 4 ro = 0x0, "PIIX4, PMTMR; ACPI §4.8.3.3", "PM timer" { VALUE 0..=23 };
        GPSTS   0x0c 2 w1c = 0x0, "PIIX4, GPSTS; ACPI §4.8.4.1", "General-purpose event status";
        GPEN    0x0e 2 rw = 0x0, "PIIX4, GPEN; ACPI §4.8.4.1", "General-purpose event enable";
        PCNTRL  0x10 4 rw = 0x0, "PIIX4, PCNTRL", "Processor control";
        PLVL2   0x14 1 ro = 0x0, "PIIX4, PLVL2", "Reading it would enter C2";
        PLVL3   0x15 1 ro = 0x0, "PIIX4, PLVL3", "Reading it would enter C3";
        GLBSTS  0x18 2 w1c = 0x0, "PIIX4, GLBSTS", "Global status";
        DEVSTS  0x1c 4 w1c = 0x0, "PIIX4, DEVSTS", "Device status";
        GLBEN   0x20 2 rw = 0x0, "PIIX4, GLBEN", "Global enable";
        GLBCTL  0x28 4 rw = 0x0, "PIIX4, GLBCTL", "Global control";
        DEVCTL  0x2c 4 rw = 0x0, "PIIX4, DEVCTL", "Device control";
        GPIREG  0x30 2 ro = 0x0, "PIIX4, GPIREG", "General-purpose inputs";
        GPOREG  0x34 4 rw = 0x7fff_bfff, "PIIX4, GPOREG", "General-purpose outputs";
    }
}

hyaline_device::registers! {
    /// Ports B2h and B3h.
    pub bank APM "apm" Port 2 {
        APMC 0x0 1 rw = 0x00, "PIIX4, APMC", "Advanced power management control: the SMI command port";
        APMS 0x1 1 rw = 0x00, "PIIX4, APMS", "Advanced power management status: scratch";
    }
}

hyaline_device::registers! {
    /// The SMBus host controller, at SMBBA.
    pub bank SMBUS "smbus" Port 16 {
        SMBHSTSTS  0x0 1 w1c = 0x00, "PIIX4, SMBHSTSTS", "Host status" { HOST_BUSY 0 ro; INTR 1; DEV_ERR 2; BUS_COL 3; FAILED 4 };
        SMBSLVSTS  0x1 1 w1c = 0x00, "PIIX4, SMBSLVSTS", "Slave status";
        SMBHSTCNT  0x2 1 rw = 0x00, "PIIX4, SMBHSTCNT", "Host control" !effect
            { INTEREN 0; KILL 1 ro; PROTOCOL 2..=4 {0 "quick", 1 "byte", 2 "byte data", 3 "word data", 5 "block"}; START 6 ro; RESERVED 7 ro };
        SMBHSTCMD  0x3 1 rw = 0x00, "PIIX4, SMBHSTCMD", "Host command";
        SMBHSTADD  0x4 1 rw = 0x00, "PIIX4, SMBHSTADD", "Host address" { READ 0; ADDRESS 1..=7 };
        SMBHSTDAT0 0x5 1 rw = 0x00, "PIIX4, SMBHSTDAT0", "Host data 0";
        SMBHSTDAT1 0x6 1 rw = 0x00, "PIIX4, SMBHSTDAT1", "Host data 1";
        SMBBLKDAT  0x7 1 rw = 0x00, "PIIX4, SMBBLKDAT", "Block data, byte after byte" !effect;
        SMBSLVCNT  0x8 1 rw = 0x00, "PIIX4, SMBSLVCNT", "Slave control";
    }
}

hyaline_device::registers! {
    bank OWN "own" Config 256 {
        COMMAND 0x04 2 ro = 0x0000, "PIIX4, PCICMD", "Command" { IO 0 rw; SPECIAL_CYCLES 3 };
        STATUS  0x06 2 ro = 0x0280, "PIIX4, PCISTS", "Status" { FAST_B2B_CAPABLE 7; DEVSEL 9..=10 {1 "medium"}; SIGNALED_TARGET_ABORT 11 w1c };
        PMBA    0x40 4 rw = 0x0001, "PIIX4, PMBA", "Base of the power-management ports" { IO 0 ro; RESERVED 1..=5 ro; BASE 6..=15; RESERVED2 16..=31 ro };
        CNTA    0x44 4 rw = 0x0, "PIIX4, CNTA", "Count A";
        CNTB    0x48 4 rw = 0x0, "PIIX4, CNTB", "Count B";
        GPICTL  0x4c 4 rw = 0x0, "PIIX4, GPICTL", "General-purpose input control";
        DEVRESD 0x50 4 rw = 0x0, "PIIX4, DEVRESD", "Device resource D";
        DEVACTA 0x54 4 rw = 0x0, "PIIX4, DEVACTA", "Device activity A";
        DEVACTB 0x58 4 rw = 0x0, "PIIX4, DEVACTB", "Device activity B" { REST 0..=24; APMC_EN 25; REST2 26..=31 };
        DEVRESA 0x5c 4 rw = 0x0, "PIIX4, DEVRESA", "Device resource A";
        DEVRESB 0x60 4 rw = 0x0, "PIIX4, DEVRESB", "Device resource B";
        DEVRESC 0x64 4 rw = 0x0, "PIIX4, DEVRESC", "Device resource C";
        DEVRESE 0x68 4 rw = 0x0, "PIIX4, DEVRESE", "Device resource E";
        DEVRESF 0x6c 4 rw = 0x0, "PIIX4, DEVRESF", "Device resource F";
        DEVRESG 0x70 4 rw = 0x0, "PIIX4, DEVRESG", "Device resource G";
        DEVRESH 0x74 4 rw = 0x0, "PIIX4, DEVRESH", "Device resource H";
        DEVRESI 0x78 4 rw = 0x0, "PIIX4, DEVRESI", "Device resource I";
        DEVRESJ 0x7c 4 rw = 0x0, "PIIX4, DEVRESJ", "Device resource J";
        PMREGMISC 0x80 1 rw = 0x00, "PIIX4, PMREGMISC", "Power-management ports are decoded" { PMIOSE 0; RESERVED 1..=7 ro };
        SMBBA   0x90 4 rw = 0x0001, "PIIX4, SMBBA", "Base of the SMBus ports" { IO 0 ro; RESERVED 1..=3 ro; BASE 4..=15; RESERVED2 16..=31 ro };
        SMBHSTCFG 0xd2 1 rw = 0x00, "PIIX4, SMBHSTCFG", "SMBus host configuration" { ENABLE 0; INTERRUPT 1..=3; RESERVED 4..=7 ro };
        SMBREV  0xd6 1 ro = 0x00, "PIIX4, SMBREV", "SMBus revision";
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

/// Command that makes the firmware hand the hardware to ACPI (FADT, ACPI_ENABLE).
pub const ACPI_ENABLE: u8 = 0xf1;
/// Command that makes the firmware take it back (FADT, ACPI_DISABLE).
pub const ACPI_DISABLE: u8 = 0xf0;

// Lines.
const SCI: u32 = 0;
const SMI: u32 = 1;
// PMSTS and PMEN.
const TMROF: u16 = 1;
const PWRBTN: u16 = 1 << 8;
// PMCNTRL.
const SCI_EN: u16 = 1;
const SUS_EN: u16 = 1 << 13;
/// DEVACTB, byte 3.
const APMC_EN: u8 = 2;
// Banks.
const BANK_PM: usize = 0;
const BANK_APM: usize = 1;
const BANK_SMBUS: usize = 2;

/// What is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// PMSTS; the timer's bit may lag, see `carry`.
    pub sts: u16,
    /// PMEN.
    pub en: u16,
    /// PMCNTRL.
    pub control: u16,
    /// How often bit 23 of the timer had changed when `sts` was last brought up to date.
    pub carry: u64,
    /// GPSTS.
    pub gpsts: u16,
    /// GPEN.
    pub gpen: u16,
    /// PCNTRL, GLBSTS, DEVSTS, GLBEN, GLBCTL, DEVCTL, GPOREG.
    pub rest: [u32; 7],
    /// APMC and APMS.
    pub apm: [u8; 2],
    /// SMBus registers 0 to 8 but for the block data.
    pub smbus: [u8; 9],
    /// SMBus block data.
    pub block: [u8; 32],
    /// The next byte of the block.
    pub block_index: u8,
    /// Level of the power button's line.
    pub button: bool,
    /// Level of the SCI line.
    pub sci: bool,
    /// Configuration registers.
    pub config: ConfigState,
}

/// Place of a register in [`State::rest`].
fn rest(offset: u64) -> Option<usize> {
    [0x10, 0x18, 0x1c, 0x20, 0x28, 0x2c, 0x34].iter().position(|o| *o == offset)
}

impl State {
    /// May a restored file hold this?
    ///
    /// # Errors
    /// An index out of range, or reserved bits.
    pub fn check(&self) -> Result<(), StateError> {
        ensure(self.block_index < 32, || {
            format!("PIIX4: index {} of the SMBus block is out of range", self.block_index)
        })?;
        ensure(
            self.en & !(PMEN.write_mask() as u16) == 0 && self.control & !(PMCNTRL.write_mask() as u16) == 0,
            || "PIIX4: reserved bits of PMEN or PMCNTRL are set".to_string(),
        )
    }

    fn new(config: ConfigState, button: bool, ticks: u64) -> State {
        State {
            sts: 0,
            en: 0,
            control: 0,
            carry: ticks >> 23,
            gpsts: 0,
            gpen: 0,
            rest: [0, 0, 0, 0, 0, 0, GPOREG.reset as u32],
            apm: [0; 2],
            smbus: [0; 9],
            block: [0; 32],
            block_index: 0,
            button,
            sci: false,
            config,
        }
    }

    /// PMSTS at a time (ACPI §4.8.3.1, TMR_STS: set whenever bit 23 of the timer changes).
    fn sts(&self, ticks: u64) -> u16 {
        self.sts | if ticks >> 23 != self.carry { TMROF } else { 0 }
    }

    fn pm(&self, offset: u64, ticks: u64) -> u32 {
        match offset {
            0x00 => u32::from(self.sts(ticks)),
            0x02 => u32::from(self.en),
            0x04 => u32::from(self.control),
            0x08 => ticks as u32 & 0xff_ffff,
            0x0c => u32::from(self.gpsts),
            0x0e => u32::from(self.gpen),
            _ => rest(offset).map_or(0, |i| self.rest[i]),
        }
    }

    /// Level of the SCI line (ACPI §4.8.3.2, SCI_EN).
    fn sci(&self) -> bool {
        self.control & SCI_EN != 0 && (self.sts & self.en != 0 || self.gpsts & self.gpen != 0)
    }
}

/// The power-management function.
#[derive(Debug)]
pub struct Piix4Pm {
    state: State,
    config: ConfigSpace,
    smm: bool,
}

impl Piix4Pm {
    /// A power-management function after reset. `smm`: the board wires `smi` to processors that have system-management mode.
    pub fn new(smm: bool) -> Piix4Pm {
        let mut config = ConfigSpace::new(&IDENTITY, &[]);
        OWN.registers.iter().for_each(|r| config.declare(r));
        let mut pm = Piix4Pm { state: State::new(ConfigState { bytes: Vec::new() }, false, 0), config, smm };
        pm.preset();
        pm
    }

    fn preset(&mut self) {
        if !self.smm {
            self.config.set(0x5b, &[APMC_EN]);
        }
    }

    /// Does what firmware does before it starts a system: the ports are decoded at `base` (a multiple of 64).
    pub fn place(&mut self, base: u16, cx: &mut Cx<'_>) {
        self.config.set(0x40, &((base & 0xffc0) | 1).to_le_bytes());
        self.config.set(0x80, &[1]);
        self.map(cx);
    }

    /// Where the power-management ports are decoded now.
    pub fn pm_base(&self) -> Option<u16> {
        let base = self.config.word(0x40) & 0xffc0;
        (self.config.byte(0x80) & 1 != 0 && base != 0).then_some(base)
    }

    fn smbus_base(&self) -> Option<u16> {
        let base = self.config.word(0x90) & 0xfff0;
        let on = self.config.byte(0xd2) & 1 != 0 && self.config.command() & config::command::IO != 0;
        (on && base != 0).then_some(base)
    }

    fn map(&self, cx: &mut Cx<'_>) {
        cx.map(BANK_PM, self.pm_base().map(u64::from));
        cx.map(BANK_SMBUS, self.smbus_base().map(u64::from));
    }

    /// A general-purpose event happened (bit number 0 to 15).
    pub fn event(&mut self, bit: u8, cx: &mut Cx<'_>) {
        self.state.gpsts |= 1u16.checked_shl(u32::from(bit)).unwrap_or(0);
        self.update(cx);
    }

    /// Brings status, line and timer up to date.
    fn update(&mut self, cx: &mut Cx<'_>) {
        let ticks = CLOCK.ticks(cx.now());
        let s = &mut self.state;
        s.sts = s.sts(ticks);
        s.carry = ticks >> 23;
        let level = s.sci();
        if level != s.sci {
            s.sci = level;
            cx.line(SCI).set(level);
        }
        self.arm(cx);
    }

    /// The timer's overflow costs a timer only while it would raise SCI.
    fn arm(&self, cx: &mut Cx<'_>) {
        let s = &self.state;
        if s.control & SCI_EN != 0 && s.en & TMROF != 0 && s.sts & TMROF == 0 {
            cx.at(0, CLOCK.time((s.carry + 1) << 23));
        } else {
            cx.cancel(0);
        }
    }

    fn read_pm(&self, offset: u64, size: u8, ticks: u64) -> u64 {
        let byte = |at: u64| {
            let r = PM.registers.iter().find(|r| r.covers(at, 1))?;
            Some(self.state.pm(r.offset, ticks) >> (8 * (at - r.offset)) & 0xff)
        };
        (0..u64::from(size)).fold(0, |v, i| v | u64::from(byte(offset + i).unwrap_or(0)) << (8 * i))
    }

    fn write_pm(&mut self, offset: u64, size: u8, value: u64, cx: &mut Cx<'_>) {
        self.update(cx);
        for r in PM.registers.iter().filter(|r| r.covers(offset, size)) {
            // Move the written bytes to where they are in the register; the others keep their stored bits.
            let (mut v, mut lanes) = (0u64, 0u64);
            for i in 0..u64::from(size) {
                if let Some(at) = (offset + i).checked_sub(r.offset).filter(|at| *at < u64::from(r.width)) {
                    v |= (value >> (8 * i) & 0xff) << (8 * at);
                    lanes |= 0xff << (8 * at);
                }
            }
            let old = u64::from(self.state.pm(r.offset, CLOCK.ticks(cx.now())));
            let new = r.write(old, old & !lanes & r.write_mask() | v & lanes) as u32;
            let s = &mut self.state;
            match r.offset {
                0x00 => s.sts = new as u16,
                0x02 => s.en = new as u16,
                0x04 => {
                    s.control = new as u16;
                    if v as u16 & SUS_EN != 0 {
                        match s.control >> 10 & 7 {
                            0 => cx.request(Request::PowerOff),
                            n => cx.unimplemented(format_args!(
                                "PIIX4: suspend type {n} is not modelled; the guest goes on"
                            )),
                        }
                    }
                }
                0x0c => s.gpsts = new as u16,
                0x0e => s.gpen = new as u16,
                o => {
                    if let Some(i) = rest(o) {
                        s.rest[i] = new;
                    }
                }
            }
        }
        self.update(cx);
    }

    fn write_apm(&mut self, offset: u64, v: u8, cx: &mut Cx<'_>) {
        self.state.apm[usize::from(offset != 0)] = v;
        if offset != 0 {
            return;
        }
        if self.smm {
            if self.config.byte(0x5b) & APMC_EN != 0 {
                cx.line(SMI).pulse();
            }
        } else {
            match v {
                ACPI_ENABLE => self.state.control |= SCI_EN,
                ACPI_DISABLE => self.state.control &= !SCI_EN,
                _ => cx.note(format_args!("SMI command {v:#04x}: there is no SMI handler")),
            }
            self.update(cx);
        }
    }

    fn read_smbus(&mut self, offset: u64) -> Result<u8, IoError> {
        let s = &mut self.state;
        match offset {
            2 => {
                s.block_index = 0;
                Ok(s.smbus[2])
            }
            7 => {
                let v = s.block[usize::from(s.block_index & 31)];
                s.block_index = (s.block_index + 1) & 31;
                Ok(v)
            }
            0..9 => Ok(s.smbus[offset as usize]),
            _ => Err(IoError::NotHere),
        }
    }

    fn write_smbus(&mut self, offset: u64, v: u8, cx: &mut Cx<'_>) -> Result<(), IoError> {
        let s = &mut self.state;
        match offset {
            0 => s.smbus[0] &= !(v & 0x1e),
            1 => s.smbus[1] &= !v,
            2 => {
                s.smbus[2] = v & 0x1d;
                if v & 2 != 0 {
                    s.smbus[0] |= 0x10;
                } else if v & 0x40 != 0 {
                    // Nobody is on the bus, so nobody acknowledges the address.
                    s.smbus[0] |= 4;
                    cx.note(format_args!("SMBus: no device answers at address {:#x}", s.smbus[4] >> 1));
                }
            }
            7 => {
                s.block[usize::from(s.block_index & 31)] = v;
                s.block_index = (s.block_index + 1) & 31;
            }
            3..9 => s.smbus[offset as usize] = v,
            _ => return Err(IoError::NotHere),
        }
        Ok(())
    }
}

impl Device for Piix4Pm {
    fn chip(&self) -> &'static Chip {
        &CHIP
    }

    fn limits(&self, bank: usize) -> Limits {
        match bank {
            BANK_APM | BANK_SMBUS => Limits::DEFAULT.implemented(1, 1),
            _ => config::LIMITS,
        }
    }

    fn read(&mut self, bank: usize, offset: u64, size: u8, cx: &mut Cx<'_>) -> Result<u64, IoError> {
        match bank {
            BANK_PM if offset < 64 => Ok(self.read_pm(offset, size, CLOCK.ticks(cx.now()))),
            BANK_APM if offset < 2 => Ok(u64::from(self.state.apm[offset as usize])),
            BANK_SMBUS => self.read_smbus(offset).map(u64::from),
            3 => self.config.read(offset, size),
            _ => Err(IoError::NotHere),
        }
    }

    fn write(
        &mut self,
        bank: usize,
        offset: u64,
        size: u8,
        value: u64,
        cx: &mut Cx<'_>,
    ) -> Result<(), IoError> {
        match bank {
            BANK_PM if offset < 64 => self.write_pm(offset, size, value, cx),
            BANK_APM if offset < 2 => self.write_apm(offset, value as u8, cx),
            BANK_SMBUS => return self.write_smbus(offset, value as u8, cx),
            3 => {
                let before = (self.pm_base(), self.smbus_base());
                self.config.write(offset, size, value, cx)?;
                if (self.pm_base(), self.smbus_base()) != before {
                    self.map(cx);
                }
            }
            _ => return Err(IoError::NotHere),
        }
        Ok(())
    }

    fn peek(&self, bank: usize, register: &Register) -> Option<u64> {
        let s = &self.state;
        match bank {
            BANK_PM if register.offset == PMTMR.offset => None,
            BANK_PM => Some(u64::from(s.pm(register.offset, s.carry << 23))),
            BANK_APM => Some(u64::from(s.apm[usize::from(register.offset != 0)])),
            BANK_SMBUS if register.offset == 7 => Some(u64::from(s.block[usize::from(s.block_index & 31)])),
            BANK_SMBUS => s.smbus.get(register.offset as usize).map(|v| u64::from(*v)),
            // What the board presets differs from the declaration.
            _ if register.offset == DEVACTB.offset => None,
            _ => self.config.peek(register),
        }
    }

    fn timer(&mut self, _timer: u32, cx: &mut Cx<'_>) {
        self.update(cx);
    }

    fn input(&mut self, pin: u32, level: bool, cx: &mut Cx<'_>) {
        if pin == 0 {
            if level && !self.state.button {
                self.state.sts |= PWRBTN;
            }
            self.state.button = level;
            self.update(cx);
        }
    }

    fn reset(&mut self, _kind: Reset, cx: &mut Cx<'_>) {
        let ticks = CLOCK.ticks(cx.now());
        self.config.reset(cx);
        self.preset();
        self.state = State::new(ConfigState { bytes: Vec::new() }, self.state.button, ticks);
        self.map(cx);
        cx.line(SCI).set(false);
        cx.line(SMI).set(false);
        cx.cancel(0);
    }

    fn save(&self) -> Result<Value, StateError> {
        to_value(&State { config: self.config.save(), ..self.state.clone() })
    }

    fn load(&mut self, state: &Value, cx: &mut Cx<'_>) -> Result<(), StateError> {
        let mut state: State = from_value(state)?;
        state.check()?;
        let config = std::mem::replace(&mut state.config, ConfigState { bytes: Vec::new() });
        self.config.load(&config, cx)?;
        self.state = state;
        self.map(cx);
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

    hyaline_device::device_laws!(Piix4Pm::new(false));

    fn bench() -> Bench<Piix4Pm> {
        Bench::new(Piix4Pm::new(false))
    }

    #[test]
    fn base_and_enable() {
        let mut b = bench();
        b.write(3, 0x40, 4, 0xffff_0601);
        assert_eq!(b.read(3, 0x40, 4), 0x601);
        assert_eq!(b.maps[&0], None);
        b.write(3, 0x80, 1, 1);
        assert_eq!(b.maps[&0], Some(0x600));
        b.write(3, 0x90, 4, 0x701);
        b.write(3, 0xd2, 1, 9);
        assert_eq!(b.maps[&2], None);
        b.write(3, 4, 2, 1);
        assert_eq!(b.maps[&2], Some(0x700));
        let mut other = bench();
        other.call(|d, cx| d.place(0x600, cx));
        assert_eq!(other.maps[&0], Some(0x600));
    }

    #[test]
    fn timer_acpi_4_8_3_3() {
        let mut b = bench();
        b.run(SECOND);
        assert_eq!(b.read(0, 8, 4), 3_579_545);
        b.run(4 * SECOND);
        assert_eq!(b.read(0, 8, 4), 17_897_727 & 0xff_ffff);
        assert_eq!(b.read(0, 0, 2), 1, "bit 23 changed");
        b.write(0, 0, 2, 1);
        assert_eq!(b.read(0, 0, 2), 0);
        assert_eq!(b.next_timer(), None);
        b.write(0, 2, 2, 1);
        b.write(1, 0, 1, u64::from(ACPI_ENABLE));
        b.run(3 * SECOND);
        assert!(b.level(SCI));
        b.write(0, 0, 1, 1);
        assert!(!b.level(SCI));
    }

    #[test]
    fn soft_off() {
        let mut b = bench();
        b.write(0, 4, 2, 0x2400);
        assert!(b.requests.is_empty());
        assert_eq!(b.complaints.len(), 1);
        b.write(0, 4, 2, 0x2000);
        assert_eq!(b.requests, [Request::PowerOff]);
        assert_eq!(b.read(0, 4, 2), 0, "SUS_EN reads as 0");
    }

    #[test]
    fn apm_command_port() {
        let mut b = bench();
        b.write(1, 0, 1, 0xf1);
        assert_eq!(b.read(0, 4, 2), 1);
        b.write(1, 0, 1, 0xf0);
        assert_eq!(b.read(0, 4, 2), 0);
        assert_eq!(b.read(3, 0x5b, 1), 2, "firmware need not set up SMM");
        let mut smm = Bench::new(Piix4Pm::new(true));
        smm.write(1, 0, 1, 0);
        assert_eq!(smm.rises(SMI), 0);
        smm.write(3, 0x5b, 1, 2);
        smm.write(1, 0, 1, 0);
        assert_eq!(smm.rises(SMI), 1);
    }

    #[test]
    fn power_button_and_events() {
        let mut b = bench();
        b.write(1, 0, 1, 0xf1);
        b.write(0, 2, 2, 0x100);
        b.input(0, true);
        b.input(0, false);
        assert!(b.level(SCI));
        b.write(0, 1, 1, 1);
        assert!(!b.level(SCI), "one byte of PMSTS");
        b.write(0, 0xe, 2, 8);
        b.call(|d, cx| d.event(3, cx));
        assert!(b.level(SCI));
        b.write(0, 0xc, 2, 8);
        assert!(!b.level(SCI));
    }

    #[test]
    fn smbus_is_empty() {
        let mut b = bench();
        b.write(2, 4, 1, 0xa1);
        b.write(2, 2, 1, 0x48);
        assert_eq!(b.read(2, 0, 1), 4, "no acknowledge");
        b.write(2, 0, 1, 0xff);
        assert_eq!(b.read(2, 0, 1), 0);
        b.write(2, 2, 1, 2);
        assert_eq!(b.read(2, 0, 1), 0x10);
    }
}
