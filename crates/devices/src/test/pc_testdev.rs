//! `pc-testdev`: scratch ports, scratch memory and software-driven interrupt lines, for kvm-unit-tests.

use hyaline_device::state::{StateError, Value, ensure, from_value, to_value};
use hyaline_device::{Chip, Cx, Device, IoError, Limits, Register, Reset, registers};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::BTreeMap;

/// Scratch ports, any width.
pub mod ioport {
    use super::registers;
    registers! {
        /// Ports E0h to E3h.
        pub bank BANK "ioport" Port 4 {
            SCRATCH 0x0 4 rw = 0x0, "QEMU pc-testdev", "Four bytes that keep what is written, in accesses of 1, 2 and 4 bytes";
        }
    }
}
/// Page flush.
pub mod flush {
    use super::registers;
    registers! {
        /// Ports E4h to E7h.
        pub bank BANK "flush" Port 4 {
            FLUSH_PAGE 0x0 4 wo = 0x0, "QEMU pc-testdev", "Write: the host forgets how it mapped the page at this guest-physical address";
        }
    }
}
/// The scratch ports once more, always split into bytes.
pub mod ioport_byte {
    use super::registers;
    registers! {
        /// Ports E8h to EBh.
        pub bank BANK "ioport-byte" Port 4 {
            SCRATCH_0 0x0 1 rw = 0x0, "QEMU pc-testdev", "First scratch byte; wider accesses are split";
            SCRATCH_1 0x1 1 rw = 0x0, "QEMU pc-testdev", "Second scratch byte";
            SCRATCH_2 0x2 1 rw = 0x0, "QEMU pc-testdev", "Third scratch byte";
            SCRATCH_3 0x3 1 rw = 0x0, "QEMU pc-testdev", "Fourth scratch byte";
        }
    }
}
/// Interrupt lines.
pub mod irq {
    use super::registers;
    registers! {
        /// Ports 2000h to 2017h: one for each line.
        pub bank BANK "irq" Port 24 {
            IRQ_LINE 0x0 1 wo = 0x0, "QEMU pc-testdev", "Port 2000h + n drives interrupt line n: 0 low, anything else high";
        }
    }
}
/// Scratch memory.
pub mod iomem {
    use super::registers;
    registers! {
        /// Memory at FF000000h.
        pub bank BANK "iomem" Memory 65536 {
            MEMORY 0x0 8 rw = 0x0, "QEMU pc-testdev", "64 KiB that keep what is written, reached as device memory in accesses of 1 to 8 bytes";
        }
    }
}

/// The chip's head.
pub static CHIP: Chip = Chip {
    name: "pc-testdev",
    title: "PC test device (pc-testdev)",
    manual: "QEMU, behaviour of -device pc-testdev as kvm-unit-tests rely on it",
    modelled: "Scratch ports at E0h and E8h, page flush at E4h, interrupt lines at 2000h, scratch memory at FF000000h.",
    not_modelled: "",
    deviations: "A page flush does nothing: no state of the guest depends on how the host maps a page.",
    banks: &[&ioport::BANK, &flush::BANK, &ioport_byte::BANK, &irq::BANK, &iomem::BANK],
    outputs: &[
        "irq0", "irq1", "irq2", "irq3", "irq4", "irq5", "irq6", "irq7", "irq8", "irq9", "irq10", "irq11",
        "irq12", "irq13", "irq14", "irq15", "irq16", "irq17", "irq18", "irq19", "irq20", "irq21", "irq22",
        "irq23",
    ],
    inputs: &[],
};

/// Where each bank is, in the order of the banks: four of ports, then one of memory.
pub const BASES: [u64; 5] = [0xe0, 0xe4, 0xe8, 0x2000, 0xff00_0000];
/// Bytes of the scratch memory.
pub const IOMEM: usize = 0x1_0000;
/// Interrupt lines.
pub const LINES: u64 = 24;

/// The device's state.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    scratch: u32,
    lines: u32,
    #[serde(serialize_with = "sparse", deserialize_with = "dense")]
    iomem: Vec<u8>,
}

const CHUNK: usize = 64;

/// Only chunks that are not all zero are saved, by their number.
fn sparse<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
    s.collect_map(bytes.chunks(CHUNK).enumerate().filter(|(_, c)| c.iter().any(|b| *b != 0)))
}

fn dense<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
    let chunks = BTreeMap::<usize, Vec<u8>>::deserialize(d)?;
    let mut bytes = vec![0; IOMEM];
    for (i, chunk) in chunks {
        let place = i
            .checked_mul(CHUNK)
            .and_then(|at| bytes.get_mut(at..at + CHUNK))
            .filter(|_| chunk.len() == CHUNK);
        let place = place.ok_or_else(|| {
            serde::de::Error::custom("a chunk of scratch memory lies outside of its 64 KiB")
        })?;
        place.copy_from_slice(&chunk);
    }
    Ok(bytes)
}

/// The test device.
#[derive(Debug)]
pub struct PcTestdev {
    s: State,
}

impl Default for PcTestdev {
    fn default() -> PcTestdev {
        PcTestdev { s: State { scratch: 0, lines: 0, iomem: vec![0; IOMEM] } }
    }
}

impl PcTestdev {
    /// A device whose scratch memory is zero and whose lines are low.
    pub fn new() -> PcTestdev {
        PcTestdev::default()
    }
}

impl Device for PcTestdev {
    fn chip(&self) -> &'static Chip {
        &CHIP
    }
    fn limits(&self, bank: usize) -> Limits {
        match bank {
            2 | 3 => Limits::sizes(1, 4).with_unaligned().implemented(1, 1),
            4 => Limits::sizes(1, 8),
            _ => Limits::sizes(1, 4),
        }
    }
    fn register(&self, bank: usize, offset: u64, is_write: bool) -> Option<&'static Register> {
        match bank {
            // One declaration stands for all lines, and one for all of the memory.
            3 => Some(&irq::IRQ_LINE),
            4 => Some(&iomem::MEMORY),
            _ => CHIP.banks.get(bank)?.at(offset, is_write),
        }
    }
    fn peek(&self, _bank: usize, register: &Register) -> Option<u64> {
        match register.name {
            "SCRATCH" => Some(u64::from(self.s.scratch)),
            "MEMORY" => self.s.iomem.first_chunk().map(|b| u64::from_le_bytes(*b)),
            name => {
                let n: u32 = name.strip_prefix("SCRATCH_")?.parse().ok()?;
                Some(u64::from(self.s.scratch >> (n * 8) & 0xff))
            }
        }
    }
    fn read(&mut self, bank: usize, offset: u64, size: u8, _cx: &mut Cx<'_>) -> Result<u64, IoError> {
        let mask = u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 8)));
        match bank {
            0 | 2 if offset < 4 => Ok(u64::from(self.s.scratch) >> (offset * 8) & mask),
            4 => {
                let at = offset as usize;
                let bytes = self.s.iomem.get(at..at + usize::from(size)).ok_or(IoError::NotHere)?;
                Ok(bytes.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b)))
            }
            _ => Err(IoError::WriteOnly),
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
            0 | 2 if offset < 4 => {
                let mask = (u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 4)))) << (offset * 8);
                self.s.scratch = (u64::from(self.s.scratch) & !mask | value << (offset * 8) & mask) as u32;
            }
            1 => cx.note(format_args!("flush of page {:#x}", value & !0xfff)),
            3 if offset < LINES => {
                self.s.lines = self.s.lines & !(1 << offset) | u32::from(value != 0) << offset;
                cx.line(offset as u32).set(value != 0);
            }
            4 => {
                let at = offset as usize;
                let bytes = self.s.iomem.get_mut(at..at + usize::from(size)).ok_or(IoError::NotHere)?;
                bytes.iter_mut().zip(value.to_le_bytes()).for_each(|(b, v)| *b = v);
            }
            _ => return Err(IoError::NotHere),
        }
        Ok(())
    }
    fn reset(&mut self, _kind: Reset, cx: &mut Cx<'_>) {
        *self = PcTestdev::default();
        (0..LINES as u32).for_each(|n| cx.line(n).set(false));
    }
    fn save(&self) -> Result<Value, StateError> {
        to_value(&self.s)
    }
    fn load(&mut self, state: &Value, _cx: &mut Cx<'_>) -> Result<(), StateError> {
        let s: State = from_value(state)?;
        ensure(s.lines >> LINES == 0, || format!("lines above 23 are driven: {:#x}", s.lines))?;
        self.s = s;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyaline_device::{Bench, device_laws};

    device_laws!(PcTestdev::new());

    #[test]
    fn scratch_in_all_widths() {
        let mut b = Bench::new(PcTestdev::new());
        b.write(0, 0, 4, 0x1234_5678);
        assert_eq!((b.read(0, 0, 1), b.read(0, 2, 2), b.read(2, 1, 1)), (0x78, 0x1234, 0x56));
        b.write(0, 1, 1, 0xff);
        b.write(0, 2, 2, 0xabcd);
        assert_eq!(b.read(0, 0, 4), 0xabcd_ff78);
        b.write(2, 3, 1, 0x11);
        assert_eq!(b.read(0, 0, 4), 0x11cd_ff78);
    }

    #[test]
    fn lines_and_memory() {
        let mut b = Bench::new(PcTestdev::new());
        b.write(3, 5, 1, 1);
        assert!(b.level(5));
        b.write(3, 5, 1, 0);
        assert!(!b.level(5));
        b.write(4, 0xfff8, 8, 0x0102_0304_0506_0708);
        assert_eq!((b.read(4, 0xfffc, 2), b.read(4, 0xfff8, 8)), (0x0304, 0x0102_0304_0506_0708));
        let saved = b.device.save().unwrap();
        b.call(|d, cx| d.reset(Reset::System, cx));
        b.call(|d, cx| d.load(&saved, cx)).unwrap();
        assert_eq!(b.read(4, 0xfffc, 2), 0x0304);
    }
}
