//! `pci-testdev`: a PCI function that counts writes, for tests of memory and port access.

use crate::pci::config::{Bar, ConfigSpace, ConfigState, HEADER_LEN, Identity, LIMITS, header};
use hyaline_device::state::{StateError, Value, ensure, from_value, to_value};
use hyaline_device::{Bank, Chip, Cx, Device, IoError, Limits, Place, Register, Reset, registers};
use serde::{Deserialize, Serialize};

const ID: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0005,
    class: 0x00_ff00,
    revision: 0,
    subsystem: (0x1af4, 0x1100),
    pin: 0,
    multifunction: false,
};
const BARS: &[Bar] = &[Bar::mem32(0, MEMORY, 4096), Bar::io(1, IO, 256)];

const MEMORY: usize = 1;
const IO: usize = 2;

static CONFIG: Bank = Bank {
    name: "config",
    place: Place::Config,
    size: 256,
    registers: &header::<HEADER_LEN>(&ID, BARS, &[]),
};

/// The header at the start of both BARs, and the place where tests write.
pub mod hdr {
    use super::registers;
    registers! {
        /// BAR 0, in memory.
        pub bank MEMORY "bar0" Memory 4096 {
            TEST       0x00 1 wo = 0x00, "BAR header", "Starts the test of this number";
            WIDTH_TYPE 0x01 1 ro = 0x00, "BAR header", "Bytes of each write of the test; 0: no such test";
            OFFSET     0x04 4 ro = 0x00, "BAR header", "Where in this BAR the test writes";
            DATA       0x08 4 ro = 0x00, "BAR header", "What the test writes";
            COUNT      0x0c 4 ro = 0x00, "BAR header", "Writes counted since the test was started";
            NAME       0x10 8 ro = 0x00, "BAR header", "The test's name, up to a zero byte";
            TARGET     0x800 4 wo = 0x00, "BAR header", "The tests' targets, a byte each";
        }
    }
    /// BAR 1, of ports: the same registers, the targets in its own upper half.
    pub static IO: hyaline_device::Bank = hyaline_device::Bank {
        name: "bar1",
        place: hyaline_device::Place::Port,
        size: 256,
        registers: &[TEST, WIDTH_TYPE, OFFSET, DATA, COUNT, NAME, IO_TARGET],
    };
    const IO_TARGET: hyaline_device::Register = hyaline_device::Register { offset: 0x80, ..TARGET };
}

/// The chip's head.
pub static CHIP: Chip = Chip {
    name: "pci-testdev",
    title: "PCI test device (pci-testdev)",
    manual: "QEMU specifications, \"QEMU PCI test device\"",
    modelled: "BAR 0 in memory and BAR 1 of ports, three tests on each: every write counts, every write at the offset counts, only the \
               given byte counts.",
    not_modelled: "BAR 2 (option membar).",
    deviations: "Writes are counted by the device itself, not through an eventfd.",
    banks: &[&CONFIG, &hdr::MEMORY, &hdr::IO],
    outputs: &[],
    inputs: &[],
};

/// The byte that the tests write.
const MATCH: u8 = 0xfa;
const KINDS: [&str; 3] = ["no-eventfd", "wildcard-eventfd", "datamatch-eventfd"];

/// The device's state.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    config: ConfigState,
    /// The test that runs: bank and number.
    current: Option<(usize, usize)>,
    count: u32,
}

/// The test device.
#[derive(Debug)]
pub struct PciTestdev {
    config: ConfigSpace,
    current: Option<(usize, usize)>,
    count: u32,
}

impl Default for PciTestdev {
    fn default() -> PciTestdev {
        PciTestdev { config: ConfigSpace::new(&ID, BARS), current: None, count: 0 }
    }
}

impl PciTestdev {
    /// A device with no test started.
    pub fn new() -> PciTestdev {
        PciTestdev::default()
    }
    /// Where test `n` of a bank writes: one byte each from the middle of the BAR on.
    fn target(bank: usize, n: usize) -> u64 {
        let middle = if bank == MEMORY { 0x800 } else { 0x80 };
        middle + n as u64
    }
    /// The header as a guest reads it.
    fn header(&self, bank: usize) -> [u8; 64] {
        let mut h = [0; 64];
        let Some((b, n)) = self.current.filter(|(b, _)| *b == bank) else { return h };
        let Some(kind) = KINDS.get(n) else { return h };
        let head = [0, 1, 0, 0].into_iter().chain((Self::target(b, n) as u32).to_le_bytes());
        let numbers = u32::from(MATCH).to_le_bytes().into_iter().chain(self.count.to_le_bytes());
        let place = if b == MEMORY { "mmio-" } else { "portio-" };
        let name = place.bytes().chain(kind.bytes());
        h.iter_mut().zip(head.chain(numbers).chain(name)).for_each(|(h, v)| *h = v);
        h
    }
}

impl Device for PciTestdev {
    fn chip(&self) -> &'static Chip {
        &CHIP
    }
    fn limits(&self, bank: usize) -> Limits {
        if bank == 0 { LIMITS } else { Limits::sizes(1, 4) }
    }
    fn register(&self, bank: usize, offset: u64, is_write: bool) -> Option<&'static Register> {
        let b = CHIP.banks.get(bank)?;
        match offset {
            0x10..0x40 if bank != 0 => b.named("NAME"),
            0x80.. if bank == IO => b.named("TARGET"),
            0x800.. if bank == MEMORY => b.named("TARGET"),
            _ => b.at(offset, is_write),
        }
    }
    fn peek(&self, bank: usize, register: &Register) -> Option<u64> {
        if bank == 0 {
            return self.config.peek(register);
        }
        let h = self.header(bank);
        let bytes = h.get(register.offset as usize..)?.get(..usize::from(register.width))?;
        register.kind.readable().then(|| bytes.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b)))
    }
    fn read(&mut self, bank: usize, offset: u64, size: u8, _cx: &mut Cx<'_>) -> Result<u64, IoError> {
        if bank == 0 {
            return self.config.read(offset, size);
        }
        let h = self.header(bank);
        let byte = |i: u64| h.get((offset + i) as usize).map_or(0, |b| u64::from(*b));
        Ok((0..u64::from(size)).map(|i| byte(i) << (8 * i)).sum())
    }
    fn write(
        &mut self,
        bank: usize,
        offset: u64,
        size: u8,
        value: u64,
        cx: &mut Cx<'_>,
    ) -> Result<(), IoError> {
        if bank == 0 {
            return self.config.write(offset, size, value, cx).map(|_| ());
        }
        if offset == 0 {
            let n = (value & 0xff) as usize;
            self.current = (n < KINDS.len()).then_some((bank, n));
            self.count = 0;
            return Ok(());
        }
        if let Some((b, n)) = self.current {
            let hit = b == bank && offset == Self::target(b, n);
            // The third test takes only its own byte, written as a byte.
            if hit && (n < 2 || size == 1 && value == u64::from(MATCH)) {
                self.count = self.count.wrapping_add(1);
            }
        }
        Ok(())
    }
    fn reset(&mut self, _kind: Reset, cx: &mut Cx<'_>) {
        self.config.reset(cx);
        (self.current, self.count) = (None, 0);
    }
    fn save(&self) -> Result<Value, StateError> {
        to_value(&State { config: self.config.save(), current: self.current, count: self.count })
    }
    fn load(&mut self, state: &Value, cx: &mut Cx<'_>) -> Result<(), StateError> {
        let s: State = from_value(state)?;
        let fits = s.current.is_none_or(|(b, n)| (b == MEMORY || b == IO) && n < KINDS.len());
        ensure(fits, || format!("there is no test {:?}", s.current))?;
        self.config.load(&s.config, cx)?;
        (self.current, self.count) = (s.current, s.count);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyaline_device::{Bench, device_laws};

    device_laws!(PciTestdev::new());

    #[test]
    fn tests_are_found_and_count() {
        let mut b = Bench::new(PciTestdev::new());
        assert_eq!(b.read(0, 0, 4), 0x0005_1b36);
        for bank in [MEMORY, IO] {
            let mut n = 0;
            loop {
                b.write(bank, 0, 1, n);
                if b.read(bank, 1, 1) != 1 {
                    break;
                }
                let (offset, data) = (b.read(bank, 4, 4), b.read(bank, 8, 4));
                assert_eq!(b.read(bank, 0xc, 4), 0);
                (0..5).for_each(|_| b.write(bank, offset, 1, data));
                assert_eq!(b.read(bank, 0xc, 4), 5, "bank {bank}, test {n}");
                b.write(bank, offset, 1, 0xce);
                assert_eq!(b.read(bank, 0xc, 4), if n < 2 { 6 } else { 5 });
                n += 1;
            }
            assert_eq!(n, 3);
        }
        b.write(IO, 0, 1, 0);
        let name: Vec<u8> = (0..17).map(|i| b.read(IO, 0x10 + i, 1) as u8).collect();
        assert_eq!(name, b"portio-no-eventfd");
        assert_eq!(b.read(MEMORY, 1, 1), 0, "the other BAR has no test running");
    }
}
