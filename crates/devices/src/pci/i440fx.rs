//! The host bridge of the 440FX chip set.
//!
//! Manual: Intel 440FX PCIset, 82441FX PCI and Memory Controller (PMC), order number 290549-001. The reset control register at 0xcf9: Intel
//! 82371SB (PIIX3), order number 290550, "RC, reset control register".
//!
//! The bridge latches the address of configuration mechanism 1 at 0xcf8. The window at 0xcfc is the machine's: it asks
//! [`I440fx::config_address`] and goes on into the space of all configuration registers.

use super::config::{self, ConfigSpace, ConfigState, HEADER_LEN, Identity, VIRTUAL_SUBSYSTEM, header};
use hyaline_device::state::{StateError, Value, ensure, from_value, to_value};
use hyaline_device::{
    Bank, Chip, Cx, Device, IoError, Limits, Place, Register, Request, Reset, Shadow, Smram,
};
use serde::{Deserialize, Serialize};

/// The chip's head.
pub static CHIP: Chip = Chip {
    name: "i440fx",
    title: "Intel 82441FX (440FX) host bridge",
    manual: "Intel 82441FX PMC data sheet (290549-001); port CF9h: Intel 82371SB PIIX3 (290550)",
    modelled: "configuration mechanism 1 (address latch), PAM registers (shadow RAM), SMRAM control with its lock, reset control at CF9h.",
    not_modelled: "DRAM timing, row boundary, arbitration, ECC and error registers are stored and have no effect; FDHC's hole is stored and reported \
        as not modelled; the turbo reset control register resets the whole machine as CF9h does.",
    deviations: "CF9h belongs to the PIIX3, which takes byte accesses inside the doubleword that the PMC decodes; both are one region here, told \
        apart by the size of the access. The subsystem IDs are those of a virtual PC, by which firmware finds out that there is fw_cfg.",
    banks: &[&PORTS, &CONFIG],
    outputs: &[],
    inputs: &[],
};

/// What the bridge says of itself.
pub const IDENTITY: Identity = Identity {
    vendor: 0x8086,
    device: 0x1237,
    class: 0x06_0000,
    revision: 0x02,
    subsystem: VIRTUAL_SUBSYSTEM,
    pin: 0,
    multifunction: false,
};

hyaline_device::registers! {
    /// Ports CF8h-CFBh.
    pub bank PORTS "ports" Port 4 {
        CONFADD 0x0 4 rw = 0x0, "PMC, CONFADD", "Configuration address, latched by doubleword accesses"
            { RESERVED 0..=1 ro; REGISTER 2..=7; FUNCTION 8..=10; DEVICE 11..=15; BUS 16..=23; RESERVED2 24..=30 ro; ENABLE 31 };
        RC      0x1 1 rw = 0x0, "PIIX3, RC", "Reset control, reached by byte accesses" when "byte access"
            { RESERVED 0 ro; HARD 1 {0 "soft reset", 1 "hard reset"}; RESET 2; RESERVED2 3..=7 ro };
    }
}

hyaline_device::registers! {
    bank OWN "own" Config 256 {
        COMMAND 0x04 2 ro = 0x0006, "PMC, PCICMD", "Command" { IO 0; MEM 1; BUS_MASTER 2; SPECIAL_CYCLES 3; SERR 8 rw };
        STATUS  0x06 2 ro = 0x0280, "PMC, PCISTS", "Status"
            { FAST_B2B_CAPABLE 7; DATA_PARITY 8; DEVSEL 9..=10 {1 "medium"}; SIGNALED_TARGET_ABORT 11 w1c; RECEIVED_TARGET_ABORT 12 w1c;
              RECEIVED_MASTER_ABORT 13 w1c; SIGNALED_SERR 14 w1c; DETECTED_PARITY 15 w1c };
        PMCCFG  0x50 2 rw = 0x0000, "PMC, PMCCFG", "PMC configuration";
        DETURBO 0x52 1 rw = 0x00, "PMC, DETURBO", "Deturbo counter";
        DBC     0x53 1 rw = 0x80, "PMC, DBC", "DBX buffer control";
        AXC     0x54 1 rw = 0x00, "PMC, AXC", "Auxiliary control";
        DRT     0x55 2 rw = 0x0000, "PMC, DRT", "DRAM row type";
        DRAMC   0x57 1 rw = 0x01, "PMC, DRAMC", "DRAM control";
        DRAMT   0x58 1 rw = 0x10, "PMC, DRAMT", "DRAM timing";
        PAM0    0x59 1 rw = 0x00, "PMC, PAM", "0xf0000-0xfffff: high half" { RESERVED 0..=3; RE 4; WE 5; CE 6 };
        PAM1    0x5a 1 rw = 0x00, "PMC, PAM", "0xc0000: low half, 0xc4000: high half" { RE0 0; WE0 1; CE0 2; RE1 4; WE1 5; CE1 6 };
        PAM2    0x5b 1 rw = 0x00, "PMC, PAM", "0xc8000: low half, 0xcc000: high half" { RE0 0; WE0 1; CE0 2; RE1 4; WE1 5; CE1 6 };
        PAM3    0x5c 1 rw = 0x00, "PMC, PAM", "0xd0000: low half, 0xd4000: high half" { RE0 0; WE0 1; CE0 2; RE1 4; WE1 5; CE1 6 };
        PAM4    0x5d 1 rw = 0x00, "PMC, PAM", "0xd8000: low half, 0xdc000: high half" { RE0 0; WE0 1; CE0 2; RE1 4; WE1 5; CE1 6 };
        PAM5    0x5e 1 rw = 0x00, "PMC, PAM", "0xe0000: low half, 0xe4000: high half" { RE0 0; WE0 1; CE0 2; RE1 4; WE1 5; CE1 6 };
        PAM6    0x5f 1 rw = 0x00, "PMC, PAM", "0xe8000: low half, 0xec000: high half" { RE0 0; WE0 1; CE0 2; RE1 4; WE1 5; CE1 6 };
        DRB0    0x60 1 rw = 0x01, "PMC, DRB", "DRAM row boundary 0";
        DRB1    0x61 1 rw = 0x01, "PMC, DRB", "DRAM row boundary 1";
        DRB2    0x62 1 rw = 0x01, "PMC, DRB", "DRAM row boundary 2";
        DRB3    0x63 1 rw = 0x01, "PMC, DRB", "DRAM row boundary 3";
        DRB4    0x64 1 rw = 0x01, "PMC, DRB", "DRAM row boundary 4";
        DRB5    0x65 1 rw = 0x01, "PMC, DRB", "DRAM row boundary 5";
        DRB6    0x66 1 rw = 0x01, "PMC, DRB", "DRAM row boundary 6";
        DRB7    0x67 1 rw = 0x01, "PMC, DRB", "DRAM row boundary 7";
        FDHC    0x68 1 rw = 0x00, "PMC, FDHC", "Fixed DRAM hole" { RESERVED 0..=5 ro; HOLE 6..=7 {1 "512 KiB-640 KiB", 2 "15-16 MiB", 3 "14-16 MiB"} };
        MTT     0x70 1 rw = 0x00, "PMC, MTT", "Multi-transaction timer";
        CLT     0x71 1 rw = 0x00, "PMC, CLT", "CPU latency timer";
        SMRAM   0x72 1 rw = 0x02, "PMC, SMRAM", "System-management RAM at 0xa0000"
            { BASE 0..=2 ro; ENABLE 3; LOCK 4; CLOSED 5; OPEN 6; RESERVED 7 ro };
        ERRCMD  0x90 1 rw = 0x00, "PMC, ERRCMD", "Error command";
        ERRSTS  0x91 1 w1c = 0x00, "PMC, ERRSTS", "Error status";
        TRC     0x93 1 rw = 0x00, "PMC, TRC", "Turbo reset control" { TURBO 0; HARD 1; RESET 2; BIST 3; RESERVED 4..=7 ro };
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

/// The segments that PAM registers switch: register offset, upper half of it, first address, bytes.
const SEGMENTS: [(usize, bool, u64, u64); 13] = [
    (0x5a, false, 0xc_0000, 0x4000),
    (0x5a, true, 0xc_4000, 0x4000),
    (0x5b, false, 0xc_8000, 0x4000),
    (0x5b, true, 0xc_c000, 0x4000),
    (0x5c, false, 0xd_0000, 0x4000),
    (0x5c, true, 0xd_4000, 0x4000),
    (0x5d, false, 0xd_8000, 0x4000),
    (0x5d, true, 0xd_c000, 0x4000),
    (0x5e, false, 0xe_0000, 0x4000),
    (0x5e, true, 0xe_4000, 0x4000),
    (0x5f, false, 0xe_8000, 0x4000),
    (0x5f, true, 0xe_c000, 0x4000),
    (0x59, true, 0xf_0000, 0x1_0000),
];

const SMRAM_ENABLE: u8 = 1 << 3;
const SMRAM_LOCK: u8 = 1 << 4;
const SMRAM_CLOSED: u8 = 1 << 5;
const SMRAM_OPEN: u8 = 1 << 6;

/// What is saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// CONFADD.
    pub address: u32,
    /// RC without its reset bit.
    pub reset_control: u8,
    /// Configuration registers.
    pub config: ConfigState,
}

/// The host bridge.
#[derive(Debug)]
pub struct I440fx {
    address: u32,
    reset_control: u8,
    config: ConfigSpace,
}

impl Default for I440fx {
    fn default() -> Self {
        I440fx::new()
    }
}

impl I440fx {
    /// A host bridge after reset.
    pub fn new() -> I440fx {
        let mut config = ConfigSpace::new(&IDENTITY, &[]);
        OWN.registers.iter().for_each(|r| config.declare(r));
        I440fx { address: 0, reset_control: 0, config }
    }

    /// Where an access to the data window (0xcfc-0xcff, `offset` 0 to 3) goes: an address in the space of all configuration
    /// registers ([`config::address`]). None if the latched address doesn't enable it: the ports are then ordinary ones.
    pub fn config_address(&self, offset: u64) -> Option<u64> {
        (self.address >> 31 != 0).then_some(u64::from(self.address & 0xff_fffc) | offset & 3)
    }

    /// The latched address itself.
    pub fn latch(&self) -> u32 {
        self.address
    }

    fn segment(&self, (offset, high, start, len): (usize, bool, u64, u64)) -> Shadow {
        let bits = self.config.byte(offset) >> if high { 4 } else { 0 };
        Shadow { start, len, read: bits & 1 != 0, write: bits & 2 != 0 }
    }

    fn smram(&self) -> Smram {
        let r = self.config.byte(0x72);
        let enabled = r & SMRAM_ENABLE != 0;
        Smram { enabled, open: enabled && r & SMRAM_OPEN != 0, closed: enabled && r & SMRAM_CLOSED != 0 }
    }

    fn tell_all(&self, cx: &mut Cx<'_>) {
        SEGMENTS.iter().for_each(|s| cx.shadow(self.segment(*s)));
        cx.smram(self.smram());
    }

    fn write_config(&mut self, offset: u64, size: u8, value: u64, cx: &mut Cx<'_>) -> Result<(), IoError> {
        let segments = SEGMENTS.map(|s| self.segment(s));
        let (smram, raw) = (self.smram(), self.config.byte(0x72));
        let hole = self.config.byte(0x68);
        let turbo = self.config.byte(0x93);
        let written = self.config.write(offset, size, value, cx)?;
        if written.touches(0x72, 1) {
            let mut new = self.config.byte(0x72);
            if raw & SMRAM_LOCK != 0 {
                // Locked: only CLOSED can still change (data sheet, SMRAM).
                new = raw & !SMRAM_CLOSED | new & SMRAM_CLOSED;
            } else if new & SMRAM_LOCK != 0 {
                new &= !SMRAM_OPEN;
            }
            self.config.set(0x72, &[new]);
        }
        for (s, old) in SEGMENTS.iter().zip(segments) {
            let new = self.segment(*s);
            if new != old {
                cx.shadow(new);
            }
        }
        if self.smram() != smram {
            cx.smram(self.smram());
        }
        if self.config.byte(0x68) != hole {
            cx.unimplemented("440FX: a hole in DRAM (FDHC) is not modelled; the memory stays");
        }
        // A reset starts when bit 2 goes from 0 to 1 (data sheet, TRC).
        if turbo & 4 == 0 && self.config.byte(0x93) & 4 != 0 {
            cx.request(Request::Reset("440FX turbo reset control register"));
        }
        Ok(())
    }
}

impl Device for I440fx {
    fn chip(&self) -> &'static Chip {
        &CHIP
    }

    fn limits(&self, bank: usize) -> Limits {
        if bank == 0 { Limits::sizes(1, 4) } else { config::LIMITS }
    }

    fn read(&mut self, bank: usize, offset: u64, size: u8, _cx: &mut Cx<'_>) -> Result<u64, IoError> {
        match (bank, offset, size) {
            (0, 0, 4) => Ok(u64::from(self.address)),
            (0, 1, 1) => Ok(u64::from(self.reset_control)),
            (1, ..) => self.config.read(offset, size),
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
        match (bank, offset, size) {
            (0, 0, 4) => self.address = CONFADD.write(0, value) as u32,
            (0, 1, 1) => {
                // The reset starts when bit 2 goes from 0 to 1; it clears the register, so the bit is never seen set.
                self.reset_control = value as u8 & 2;
                if value & 4 != 0 {
                    cx.request(Request::Reset("reset control register (port 0xcf9)"));
                }
            }
            (1, ..) => self.write_config(offset, size, value, cx)?,
            _ => return Err(IoError::NotHere),
        }
        Ok(())
    }

    fn register(&self, bank: usize, offset: u64, is_write: bool) -> Option<&'static Register> {
        match (bank, offset) {
            (0, 0) => Some(&CONFADD),
            (0, 1) => Some(&RC),
            (0, _) => None,
            _ => CONFIG.at(offset, is_write),
        }
    }

    fn peek(&self, bank: usize, register: &Register) -> Option<u64> {
        match (bank, register.offset) {
            (0, 0) => Some(u64::from(self.address)),
            (0, _) => Some(u64::from(self.reset_control)),
            _ => self.config.peek(register),
        }
    }

    fn reset(&mut self, _kind: Reset, cx: &mut Cx<'_>) {
        self.address = 0;
        self.reset_control = 0;
        self.config.reset(cx);
        self.tell_all(cx);
    }

    fn save(&self) -> Result<Value, StateError> {
        let (address, reset_control, config) = (self.address, self.reset_control, self.config.save());
        to_value(&State { address, reset_control, config })
    }

    fn load(&mut self, state: &Value, cx: &mut Cx<'_>) -> Result<(), StateError> {
        let s: State = from_value(state)?;
        ensure(s.address & 0x7f00_0003 == 0 && s.reset_control & !2 == 0, || {
            format!(
                "440FX: address latch {:#x} or reset control {:#x} has reserved bits set",
                s.address, s.reset_control
            )
        })?;
        self.config.load(&s.config, cx)?;
        (self.address, self.reset_control) = (s.address, s.reset_control);
        self.tell_all(cx);
        Ok(())
    }

    fn as_any(&mut self) -> Option<&mut dyn std::any::Any> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyaline_device::{Bench, Effect};

    hyaline_device::device_laws!(I440fx::new());

    #[test]
    fn address_latch() {
        let mut b = Bench::new(I440fx::new());
        assert_eq!(b.device.config_address(0), None);
        b.write(0, 0, 4, 0x8000_1a13);
        assert_eq!(b.read(0, 0, 4), 0x8000_1a10);
        assert_eq!(b.device.config_address(3), Some(config::address(0, 3, 2) + 0x13));
        b.write(0, 0, 1, 0);
        b.write(0, 0, 2, 0);
        assert_eq!(b.read(0, 0, 4), 0x8000_1a10, "only doublewords are latched");
    }

    #[test]
    fn reset_control_cf9() {
        let mut b = Bench::new(I440fx::new());
        b.write(0, 1, 1, 2);
        assert_eq!(b.read(0, 1, 1), 2);
        assert!(b.requests.is_empty());
        b.write(0, 1, 1, 6);
        assert!(matches!(b.requests[..], [Request::Reset(_)]));
    }

    #[test]
    fn pam_switches_segments() {
        let mut b = Bench::new(I440fx::new());
        b.write(1, 0x59, 1, 0x30);
        assert_eq!(
            b.last,
            [Effect::Shadow(Shadow { start: 0xf_0000, len: 0x1_0000, read: true, write: true })]
        );
        b.write(1, 0x5c, 4, 0x0000_0021);
        assert_eq!(
            b.last,
            [
                Effect::Shadow(Shadow { start: 0xd_0000, len: 0x4000, read: true, write: false }),
                Effect::Shadow(Shadow { start: 0xd_4000, len: 0x4000, read: false, write: true })
            ]
        );
        b.call(|d, cx| d.reset(Reset::System, cx));
        assert!(b.last.iter().all(|e| !matches!(e, Effect::Shadow(Shadow { read: true, .. }))));
    }

    #[test]
    fn smram_locks() {
        let mut b = Bench::new(I440fx::new());
        b.write(1, 0x72, 1, 0x48);
        assert_eq!(b.last, [Effect::Smram(Smram { enabled: true, open: true, closed: false })]);
        b.write(1, 0x72, 1, 0x58);
        assert_eq!(b.read(1, 0x72, 1), 0x1a, "locking closes it");
        b.write(1, 0x72, 1, 0x40);
        assert_eq!(b.read(1, 0x72, 1), 0x1a);
    }

    #[test]
    fn firmware_finds_a_virtual_pc() {
        let mut b = Bench::new(I440fx::new());
        assert_eq!(b.read(1, 0, 4), 0x1237_8086);
        assert_eq!(b.read(1, 0x2c, 4), 0x1100_1af4);
        b.write(1, 4, 2, 0);
        assert_eq!(b.read(1, 4, 2), 6);
    }
}
