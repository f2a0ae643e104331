//! A PCI function's configuration space, as a component of a device.
//!
//! PCI Local Bus Specification 3.0, §6.1 to §6.2.5. The function's [`Identity`] and [`Bar`]s are constants of its chip. From them come
//! both the declared registers ([`header`]) and the working space ([`ConfigSpace`]). The machine maps each function's configuration bank into the
//! space of all configuration registers, at [`address`]; nothing of this file knows where a function sits.

use hyaline_device::state::{StateError, ensure};
use hyaline_device::{Cx, Field, IoError, Kind, Limits, Register};
use serde::{Deserialize, Serialize};

/// Bytes of a function's configuration space.
pub const SIZE: usize = 256;

/// Sizes of access to a configuration bank: 1, 2 and 4 bytes, aligned.
pub const LIMITS: Limits = Limits::sizes(1, 4);

/// Number of registers of a [`header`].
pub const HEADER_LEN: usize = 27;

/// Where the registers of a function begin in the space of all configuration registers: `bus << 16 | device << 11 | function << 8`
/// (PCI 3.0 §3.2.2.3.2, without the enable bit).
pub const fn address(bus: u8, device: u8, function: u8) -> u64 {
    (bus as u64) << 16 | ((device & 0x1f) as u64) << 11 | ((function & 7) as u64) << 8
}

/// What a function says of itself (§6.2.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Class code: base class, sub-class, programming interface (24 bits).
    pub class: u32,
    /// Revision ID.
    pub revision: u8,
    /// Subsystem vendor ID and subsystem ID. `(0, 0)` if the function has none.
    pub subsystem: (u16, u16),
    /// Interrupt pin: 0 none, 1 to 4 for INTA# to INTD#.
    pub pin: u8,
    /// The device has more than this one function (header type, bit 7).
    pub multifunction: bool,
}

/// The subsystem IDs of the functions of a virtual PC. Firmware (SeaBIOS, OVMF) tells by those of the host bridge that it runs
/// in a machine that has fw_cfg.
pub const VIRTUAL_SUBSYSTEM: (u16, u16) = (0x1af4, 0x1100);

/// What a base address register decodes (§6.2.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Mem32 {
        /// Reads have no side effects.
        prefetch: bool,
    },
    /// Memory anywhere; takes this register and the next.
    Mem64 {
        /// Reads have no side effects.
        prefetch: bool,
    },
}

/// One base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Number of the (first) register, 0 to 5.
    pub index: usize,
    /// The device's bank that it maps.
    pub bank: usize,
    /// Bytes: a power of two, at least 4 for I/O and 16 for memory.
    pub size: u64,
    /// What it decodes.
    pub kind: BarKind,
}

impl Bar {
    /// An I/O BAR.
    pub const fn io(index: usize, bank: usize, size: u64) -> Bar {
        Bar { index, bank, size, kind: BarKind::Io }
    }
    /// A 32-bit memory BAR, not prefetchable.
    pub const fn mem32(index: usize, bank: usize, size: u64) -> Bar {
        Bar { index, bank, size, kind: BarKind::Mem32 { prefetch: false } }
    }
    /// A 64-bit memory BAR, not prefetchable.
    pub const fn mem64(index: usize, bank: usize, size: u64) -> Bar {
        Bar { index, bank, size, kind: BarKind::Mem64 { prefetch: false } }
    }
    /// The same, prefetchable (memory only).
    pub const fn prefetchable(self) -> Bar {
        let kind = match self.kind {
            BarKind::Io => BarKind::Io,
            BarKind::Mem32 { .. } => BarKind::Mem32 { prefetch: true },
            BarKind::Mem64 { .. } => BarKind::Mem64 { prefetch: true },
        };
        Bar { kind, ..self }
    }
    /// The read-only low bits.
    const fn type_bits(&self) -> u32 {
        match self.kind {
            BarKind::Io => 1,
            BarKind::Mem32 { prefetch } => (prefetch as u32) << 3,
            BarKind::Mem64 { prefetch } => 4 | (prefetch as u32) << 3,
        }
    }
}

hyaline_device::registers! {
    /// The registers that every function has (§6.1). Chips list them with their own through [`header`], which puts in their values.
    pub bank TYPE0 "config" Config 256 {
        VENDOR_ID       0x00 2 ro = 0xffff, "PCI 3.0 §6.2.1", "Vendor ID";
        DEVICE_ID       0x02 2 ro = 0xffff, "PCI 3.0 §6.2.1", "Device ID";
        COMMAND         0x04 2 ro = 0x0000, "PCI 3.0 §6.2.2", "Command" {
            IO 0 rw; MEM 1 rw; BUS_MASTER 2 rw; SPECIAL_CYCLES 3; MWI 4; VGA_SNOOP 5; PARITY 6 rw; SERR 8 rw; FAST_B2B 9;
            INTX_DISABLE 10 rw };
        STATUS          0x06 2 ro = 0x0000, "PCI 3.0 §6.2.3", "Status" {
            INTX 3; CAP_LIST 4; MHZ66 5; FAST_B2B_CAPABLE 7; DATA_PARITY 8 w1c; DEVSEL 9..=10 {0 "fast", 1 "medium", 2 "slow"};
            SIGNALED_TARGET_ABORT 11 w1c; RECEIVED_TARGET_ABORT 12 w1c; RECEIVED_MASTER_ABORT 13 w1c; SIGNALED_SERR 14 w1c;
            DETECTED_PARITY 15 w1c };
        REVISION_ID     0x08 1 ro = 0x00, "PCI 3.0 §6.2.1", "Revision ID";
        CLASS_INTERFACE 0x09 1 ro = 0x00, "PCI 3.0 §6.2.1", "Programming interface";
        CLASS_SUB       0x0a 1 ro = 0x00, "PCI 3.0 §6.2.1", "Sub-class";
        CLASS_BASE      0x0b 1 ro = 0x00, "PCI 3.0 §6.2.1", "Base class";
        CACHE_LINE      0x0c 1 rw = 0x00, "PCI 3.0 §6.2.4", "Cache line size";
        LATENCY         0x0d 1 rw = 0x00, "PCI 3.0 §6.2.4", "Latency timer";
        HEADER_TYPE     0x0e 1 ro = 0x00, "PCI 3.0 §6.2.1", "Header type" { LAYOUT 0..=6; MULTIFUNCTION 7 };
        BIST            0x0f 1 ro = 0x00, "PCI 3.0 §6.2.4", "Built-in self test";
        BAR0            0x10 4 ro = 0, "PCI 3.0 §6.2.5.1", "Base address 0";
        BAR1            0x14 4 ro = 0, "PCI 3.0 §6.2.5.1", "Base address 1";
        BAR2            0x18 4 ro = 0, "PCI 3.0 §6.2.5.1", "Base address 2";
        BAR3            0x1c 4 ro = 0, "PCI 3.0 §6.2.5.1", "Base address 3";
        BAR4            0x20 4 ro = 0, "PCI 3.0 §6.2.5.1", "Base address 4";
        BAR5            0x24 4 ro = 0, "PCI 3.0 §6.2.5.1", "Base address 5";
        CARDBUS_CIS     0x28 4 ro = 0, "PCI 3.0 §6.2.4", "CardBus CIS pointer";
        SUBSYSTEM_VENDOR 0x2c 2 ro = 0, "PCI 3.0 §6.2.4", "Subsystem vendor ID";
        SUBSYSTEM_ID    0x2e 2 ro = 0, "PCI 3.0 §6.2.4", "Subsystem ID";
        ROM_BASE        0x30 4 ro = 0, "PCI 3.0 §6.2.5.2", "Expansion ROM base address";
        CAP_POINTER     0x34 1 ro = 0, "PCI 3.0 §6.7", "First capability";
        INTERRUPT_LINE  0x3c 1 rw = 0, "PCI 3.0 §6.2.4", "Interrupt line: software's own note";
        INTERRUPT_PIN   0x3d 1 ro = 0, "PCI 3.0 §6.2.4", "Interrupt pin" {
            PIN 0..=2 {0 "none", 1 "INTA#", 2 "INTB#", 3 "INTC#", 4 "INTD#"} };
        MIN_GNT         0x3e 1 ro = 0, "PCI 3.0 §6.2.4", "Burst period wanted";
        MAX_LAT         0x3f 1 ro = 0, "PCI 3.0 §6.2.4", "Latency tolerated";
    }
}

static PLAIN_BAR: &[Field] = &[];

/// The registers of a function: the type-0 header with the function's own values, then `own`. A register of `own` that has the offset of one of
/// the header takes its place. `N` is [`HEADER_LEN`] and the number of the others.
///
/// ```
/// use hyaline_device::{Bank, Place};
/// use hyaline_devices::pci::config::*;
/// const ID: Identity = Identity {
///     vendor: 0x1022, device: 0x2000, class: 0x02_0000, revision: 0x10, subsystem: (0, 0), pin: 1, multifunction: false,
/// };
/// const BARS: &[Bar] = &[Bar::io(0, 1, 32)];
/// static CONFIG: Bank = Bank { name: "config", place: Place::Config, size: 256, registers: &header::<HEADER_LEN>(&ID, BARS, &[]) };
/// let space = ConfigSpace::new(&ID, BARS);
/// assert_eq!(space.read(0, 4), Ok(0x2000_1022));
/// assert_eq!(CONFIG.named("BAR0").unwrap().reset, 1);
/// ```
pub const fn header<const N: usize>(id: &Identity, bars: &[Bar], own: &[Register]) -> [Register; N] {
    let mut out = [VENDOR_ID; N];
    let mut i = 0;
    while i < HEADER_LEN {
        out[i] = with_values(TYPE0.registers[i], id, bars);
        let mut o = 0;
        while o < own.len() {
            if own[o].offset == out[i].offset {
                out[i] = own[o];
            }
            o += 1;
        }
        i += 1;
    }
    let (mut n, mut o) = (HEADER_LEN, 0);
    while o < own.len() {
        let mut h = 0;
        while h < HEADER_LEN && TYPE0.registers[h].offset != own[o].offset {
            h += 1;
        }
        if h == HEADER_LEN {
            out[n] = own[o];
            n += 1;
        }
        o += 1;
    }
    assert!(n == N, "N must be HEADER_LEN plus the number of the function's own registers");
    out
}

/// A register of the header with the function's values.
const fn with_values(r: Register, id: &Identity, bars: &[Bar]) -> Register {
    let mut out = r;
    out.reset = match out.offset {
        0x00 => id.vendor as u64,
        0x02 => id.device as u64,
        0x08 => id.revision as u64,
        0x09 => (id.class & 0xff) as u64,
        0x0a => (id.class >> 8 & 0xff) as u64,
        0x0b => (id.class >> 16 & 0xff) as u64,
        0x0e => (id.multifunction as u64) << 7,
        0x2c => id.subsystem.0 as u64,
        0x2e => id.subsystem.1 as u64,
        0x3d => id.pin as u64,
        _ => out.reset,
    };
    let mut b = 0;
    while b < bars.len() {
        let first = 0x10 + 4 * bars[b].index as u64;
        if out.offset == first {
            out.reset = bars[b].type_bits() as u64;
            out.kind = Kind::Rw;
            out.fields = PLAIN_BAR;
        } else if matches!(bars[b].kind, BarKind::Mem64 { .. }) && out.offset == first + 4 {
            out.kind = Kind::Rw;
        }
        b += 1;
    }
    out
}

/// Bits of the command register.
pub mod command {
    /// I/O space is decoded.
    pub const IO: u16 = 1 << 0;
    /// Memory space is decoded.
    pub const MEM: u16 = 1 << 1;
    /// The function may act as a bus master.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// INTx# stays silent.
    pub const INTX_DISABLE: u16 = 1 << 10;
}

const STATUS_INTX: u8 = 1 << 3;
const STATUS_CAP_LIST: u8 = 1 << 4;

/// What is saved of a configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigState {
    /// All bytes, as software reads them.
    pub bytes: Vec<u8>,
}

/// A function's configuration space.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    reset: [u8; SIZE],
    writable: [u8; SIZE],
    clearable: [u8; SIZE],
    bars: &'static [Bar],
    next_capability: usize,
    last_capability: usize,
    /// What [`Cx::map`] was last told, one for each of `bars`. Follows from `bytes`.
    mapped: [Option<u64>; 6],
}

/// What a write to configuration space changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// First byte written.
    pub offset: usize,
    /// Bytes written.
    pub len: usize,
    /// The command register took another value.
    pub command: bool,
}

impl Written {
    /// Was any of `len` bytes at `offset` written?
    pub fn touches(&self, offset: usize, len: usize) -> bool {
        self.offset < offset + len && offset < self.offset + self.len
    }
}

impl ConfigSpace {
    /// A configuration space after reset. The function's own registers are added with [`ConfigSpace::define`] and
    /// [`ConfigSpace::declare`], its capabilities with [`ConfigSpace::add_capability`].
    ///
    /// # Panics
    /// With BARs that PCI doesn't allow, or more than six: a mistake of the chip's author, not reachable from a guest.
    pub fn new(id: &Identity, bars: &'static [Bar]) -> ConfigSpace {
        let mut c = ConfigSpace {
            bytes: [0; SIZE],
            reset: [0; SIZE],
            writable: [0; SIZE],
            clearable: [0; SIZE],
            bars,
            next_capability: 0x40,
            last_capability: 0,
            mapped: [None; 6],
        };
        // What the declaration says of each register holds; BARs are treated apart.
        for r in header::<HEADER_LEN>(id, bars, &[]) {
            if !(0x10..0x28).contains(&r.offset) {
                c.declare(&r);
            }
        }
        assert!(bars.len() <= 6, "a function has at most six base address registers");
        for bar in bars {
            let least = if bar.kind == BarKind::Io { 4 } else { 16 };
            assert!(bar.size.is_power_of_two() && bar.size >= least, "BAR{} has an odd size", bar.index);
            let wide = matches!(bar.kind, BarKind::Mem64 { .. });
            assert!(bar.index + usize::from(wide) < 6, "BAR{} does not exist", bar.index);
            let at = 0x10 + 4 * bar.index;
            c.define(at, &bar.type_bits().to_le_bytes(), &(!(bar.size - 1) as u32).to_le_bytes());
            if wide {
                c.define(at + 4, &[0; 4], &((!(bar.size - 1) >> 32) as u32).to_le_bytes());
            }
        }
        c
    }

    /// Adds one register as it was declared: reset value, writable and write-one-to-clear bits.
    ///
    /// # Panics
    /// Past the end of the space.
    pub fn declare(&mut self, r: &Register) {
        let (at, n) = (r.offset as usize, r.width as usize);
        let write = r.write_mask().to_le_bytes();
        let clear = r.mask_of(Kind::W1c).to_le_bytes();
        self.define(at, &r.reset.to_le_bytes()[..n], &write[..n]);
        self.clearable[at..at + n].copy_from_slice(&clear[..n]);
    }

    /// Gives bytes a reset value and says which of their bits software can write.
    ///
    /// # Panics
    /// Past the end of the space, or with slices of different lengths.
    pub fn define(&mut self, offset: usize, value: &[u8], writable: &[u8]) {
        self.bytes[offset..offset + value.len()].copy_from_slice(value);
        self.reset[offset..offset + value.len()].copy_from_slice(value);
        self.writable[offset..offset + writable.len()].copy_from_slice(writable);
    }

    /// Adds a capability of `len` bytes (its two header bytes included) to the list and gives its offset (§6.7).
    ///
    /// # Panics
    /// When the space is full.
    pub fn add_capability(&mut self, id: u8, len: usize) -> usize {
        let at = self.next_capability;
        self.add_capability_at(at, id, len);
        at
    }

    /// As [`ConfigSpace::add_capability`], at an offset of the chip's choice.
    ///
    /// # Panics
    /// When it does not fit.
    pub fn add_capability_at(&mut self, at: usize, id: u8, len: usize) {
        assert!(
            at >= 0x40 && at.is_multiple_of(4) && at + len <= SIZE,
            "no room for capability {id:#x} at {at:#x}"
        );
        let link =
            if self.last_capability == 0 { CAP_POINTER.offset as usize } else { self.last_capability + 1 };
        self.define(link, &[at as u8], &[0]);
        self.define(at, &[id, 0], &[0, 0]);
        let status = STATUS.offset as usize;
        self.bytes[status] |= STATUS_CAP_LIST;
        self.reset[status] |= STATUS_CAP_LIST;
        self.last_capability = at;
        self.next_capability = self.next_capability.max((at + len + 3) & !3);
    }

    /// Changes bytes from the device's side, whatever software may do with them. What lies past the end is dropped.
    pub fn set(&mut self, offset: usize, value: &[u8]) {
        for (i, v) in value.iter().enumerate() {
            if let Some(b) = self.bytes.get_mut(offset + i) {
                *b = *v;
            }
        }
    }

    /// One byte.
    pub fn byte(&self, offset: usize) -> u8 {
        self.bytes.get(offset).copied().unwrap_or(0xff)
    }
    /// Two bytes.
    pub fn word(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.byte(offset), self.byte(offset + 1)])
    }
    /// Four bytes.
    pub fn dword(&self, offset: usize) -> u32 {
        u32::from(self.word(offset)) | u32::from(self.word(offset + 2)) << 16
    }

    /// The command register; see [`command`].
    pub fn command(&self) -> u16 {
        self.word(COMMAND.offset as usize)
    }
    /// May the function master the bus?
    pub fn bus_master(&self) -> bool {
        self.command() & command::BUS_MASTER != 0
    }
    /// Must INTx# stay silent?
    pub fn intx_disabled(&self) -> bool {
        self.command() & command::INTX_DISABLE != 0
    }
    /// Shows the function's interrupt condition in the status register (§6.2.3, bit 3) and gives the level for the INTx# line.
    pub fn intx(&mut self, pending: bool) -> bool {
        let status = STATUS.offset as usize;
        self.bytes[status] = self.bytes[status] & !STATUS_INTX | if pending { STATUS_INTX } else { 0 };
        pending && !self.intx_disabled()
    }

    /// Where a BAR decodes now. None if decoding is off, or the base can't be one: 0, past the end of the space, or all ones (a size
    /// being probed with decoding left on).
    pub fn base(&self, bar: &Bar) -> Option<u64> {
        let at = 0x10 + 4 * bar.index;
        let low = u64::from(self.dword(at));
        let (raw, enable, end) = match bar.kind {
            BarKind::Io => (low & !3, command::IO, 0xffff),
            BarKind::Mem32 { .. } => (low & !0xf, command::MEM, 0xffff_ffff),
            BarKind::Mem64 { .. } => {
                (low & !0xf | u64::from(self.dword(at + 4)) << 32, command::MEM, u64::MAX)
            }
        };
        let probe = !(bar.size - 1) & if bar.kind == BarKind::Io { 0xffff_ffff } else { end };
        let last = raw.checked_add(bar.size - 1)?;
        (self.command() & enable != 0 && raw != 0 && raw != probe && last <= end).then_some(raw)
    }

    /// Reads 1, 2 or 4 aligned bytes.
    ///
    /// # Errors
    /// Another size, or past the end.
    pub fn read(&self, offset: u64, size: u8) -> Result<u64, IoError> {
        let at = range(offset, size)?;
        Ok(self.bytes[at].iter().rev().fold(0, |v, b| v << 8 | u64::from(*b)))
    }

    /// Writes 1, 2 or 4 aligned bytes through the write masks; moves banks whose BAR or enable changed.
    ///
    /// # Errors
    /// Another size, or past the end.
    pub fn write(&mut self, offset: u64, size: u8, value: u64, cx: &mut Cx<'_>) -> Result<Written, IoError> {
        let at = range(offset, size)?;
        let before = self.command();
        for (i, v) in at.clone().zip(value.to_le_bytes()) {
            let w = self.writable[i];
            self.bytes[i] = (self.bytes[i] & !w | v & w) & !(v & self.clearable[i]);
        }
        self.remap(cx);
        Ok(Written { offset: at.start, len: at.len(), command: self.command() != before })
    }

    fn remap(&mut self, cx: &mut Cx<'_>) {
        for (i, bar) in self.bars.iter().enumerate() {
            let base = self.base(bar);
            if self.mapped[i] != base {
                self.mapped[i] = base;
                cx.map(bar.bank, base);
            }
        }
    }

    /// Back to the reset values (§6.1: RST# clears what software wrote).
    pub fn reset(&mut self, cx: &mut Cx<'_>) {
        self.bytes = self.reset;
        self.remap(cx);
    }

    /// What an inspector sees of a configuration register.
    pub fn peek(&self, r: &Register) -> Option<u64> {
        let at = range(r.offset, r.width).ok()?;
        Some(self.bytes[at].iter().rev().fold(0, |v, b| v << 8 | u64::from(*b)))
    }

    /// The state, for the device's own.
    pub fn save(&self) -> ConfigState {
        ConfigState { bytes: self.bytes.to_vec() }
    }

    /// Can this space take `state`? For the device's `check`, before anything is changed.
    ///
    /// # Errors
    /// It has the wrong length, or other values in bits that never change.
    pub fn check(&self, state: &ConfigState) -> Result<(), StateError> {
        ensure(state.bytes.len() == SIZE, || {
            format!("the configuration space has {} bytes instead of {SIZE}", state.bytes.len())
        })?;
        for at in [0, 1, 2, 3, 8, 9, 10, 11, 14] {
            let (have, want) = (state.bytes[at], self.reset[at]);
            ensure(have == want, || {
                format!(
                    "configuration byte {at:#x} is {have:#x} in the saved state, and {want:#x} in this function"
                )
            })?;
        }
        for bar in self.bars {
            for i in 0..4 {
                let at = 0x10 + 4 * bar.index + i;
                let fixed = !self.writable[at];
                ensure(state.bytes[at] & fixed == self.reset[at] & fixed, || {
                    format!("BAR{} is not aligned to its size in the saved state", bar.index)
                })?;
            }
        }
        Ok(())
    }

    /// Takes a state and tells where all banks are.
    ///
    /// # Errors
    /// See [`ConfigSpace::check`]; nothing was changed then.
    pub fn load(&mut self, state: &ConfigState, cx: &mut Cx<'_>) -> Result<(), StateError> {
        self.check(state)?;
        self.bytes.copy_from_slice(&state.bytes);
        for (i, bar) in self.bars.iter().enumerate() {
            self.mapped[i] = self.base(bar);
            cx.map(bar.bank, self.mapped[i]);
        }
        Ok(())
    }
}

fn range(offset: u64, size: u8) -> Result<std::ops::Range<usize>, IoError> {
    if !matches!(size, 1 | 2 | 4) {
        return Err(IoError::BadSize);
    }
    if !offset.is_multiple_of(u64::from(size)) {
        return Err(IoError::Unaligned);
    }
    let start = usize::try_from(offset).map_err(|_| IoError::NotHere)?;
    if start >= SIZE { Err(IoError::NotHere) } else { Ok(start..start + usize::from(size)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyaline_device::state::{Value, from_value, to_value};
    use hyaline_device::{Bank, Bench, Chip, Device, Place, Reset};

    const ID: Identity = Identity {
        vendor: 0x1022,
        device: 0x2000,
        class: 0x02_0000,
        revision: 0x10,
        subsystem: VIRTUAL_SUBSYSTEM,
        pin: 1,
        multifunction: false,
    };
    const BARS: &[Bar] =
        &[Bar::io(0, 1, 32), Bar::mem32(1, 2, 4096), Bar::mem64(2, 3, 1 << 33).prefetchable()];
    static CONFIG: Bank = Bank {
        name: "config",
        place: Place::Config,
        size: 256,
        registers: &header::<HEADER_LEN>(&ID, BARS, &[]),
    };
    static CHIP: Chip = Chip {
        name: "function",
        title: "A PCI function",
        manual: "PCI 3.0",
        modelled: "",
        not_modelled: "",
        deviations: "",
        banks: &[&CONFIG],
        outputs: &[],
        inputs: &[],
    };

    /// A function that has nothing but its configuration space.
    struct Function(ConfigSpace);

    impl Device for Function {
        fn chip(&self) -> &'static Chip {
            &CHIP
        }
        fn read(&mut self, _: usize, offset: u64, size: u8, _: &mut Cx<'_>) -> Result<u64, IoError> {
            self.0.read(offset, size)
        }
        fn write(
            &mut self,
            _: usize,
            offset: u64,
            size: u8,
            value: u64,
            cx: &mut Cx<'_>,
        ) -> Result<(), IoError> {
            self.0.write(offset, size, value, cx).map(|_| ())
        }
        fn limits(&self, _: usize) -> Limits {
            LIMITS
        }
        fn peek(&self, _: usize, r: &Register) -> Option<u64> {
            self.0.peek(r)
        }
        fn reset(&mut self, _: Reset, cx: &mut Cx<'_>) {
            self.0.reset(cx);
        }
        fn save(&self) -> Result<Value, StateError> {
            to_value(&self.0.save())
        }
        fn load(&mut self, state: &Value, cx: &mut Cx<'_>) -> Result<(), StateError> {
            self.0.load(&from_value(state)?, cx)
        }
    }

    fn function() -> Function {
        let mut c = ConfigSpace::new(&ID, BARS);
        c.add_capability(0x01, 8);
        c.add_capability(0x05, 14);
        Function(c)
    }

    hyaline_device::device_laws!(function());

    #[test]
    fn header_shows_the_identity() {
        let mut b = Bench::new(function());
        assert_eq!(b.read(0, 0, 4), 0x2000_1022);
        assert_eq!(b.read(0, 8, 4), 0x0200_0010);
        assert_eq!(b.read(0, 0x2c, 4), 0x1100_1af4);
        assert_eq!(b.read(0, 0x3d, 1), 1);
        b.write(0, 0, 4, 0);
        assert_eq!(b.read(0, 0, 4), 0x2000_1022, "IDs can't be written");
        assert_eq!(CONFIG.named("DEVICE_ID").map(|r| r.reset), Some(0x2000));
    }

    /// §6.2.5.1: all ones written, the size read back.
    #[test]
    fn bars_tell_their_sizes() {
        let mut b = Bench::new(function());
        for (at, sized) in
            [(0x10, 0xffff_ffe1), (0x14, 0xffff_f000), (0x18, 0x0000_000c), (0x1c, 0xffff_fffe), (0x20, 0)]
        {
            b.write(0, at, 4, 0xffff_ffff);
            assert_eq!(b.read(0, at, 4), sized, "BAR at {at:#x}");
        }
    }

    #[test]
    fn banks_follow_bars_and_command() {
        let mut b = Bench::new(function());
        b.write(0, 0x10, 4, 0xc000);
        b.write(0, 0x14, 4, 0xfebf_1234);
        assert!(b.maps.is_empty(), "decoding is off after reset");
        b.write(0, 4, 2, 3);
        assert_eq!(b.maps[&1], Some(0xc000));
        assert_eq!(b.maps[&2], Some(0xfebf_1000));
        assert!(!b.maps.contains_key(&3), "base 0 is no base");
        b.write(0, 0x1c, 4, 0x12);
        assert_eq!(b.maps[&3], Some(0x12_0000_0000));
        b.write(0, 0x10, 4, 0xffff_ffff);
        assert_eq!(b.maps[&1], None, "probing with decoding on maps nothing");
        b.write(0, 4, 1, 0);
        assert_eq!(b.maps[&2], None);
        b.write(0, 4, 1, 2);
        b.call(|d, cx| d.reset(Reset::System, cx));
        assert_eq!(b.maps[&2], None);
        assert_eq!(b.read(0, 0x14, 4), 0);
    }

    #[test]
    fn status_bits_are_cleared_by_ones() {
        let mut b = Bench::new(function());
        b.device.0.set(7, &[0x30]);
        b.write(0, 4, 4, 0x2000_0000);
        assert_eq!(b.read(0, 6, 2), 0x1010, "one of two bits cleared, the capability bit stays");
        assert!(b.device.0.intx(true));
        assert_eq!(b.read(0, 6, 2) & 8, 8);
        b.write(0, 5, 1, 4);
        assert!(!b.device.0.intx(true), "INTx disabled");
    }

    #[test]
    fn capabilities_are_chained() {
        let mut b = Bench::new(function());
        assert_eq!(b.read(0, 0x34, 1), 0x40);
        assert_eq!(b.read(0, 0x40, 2), 0x4801);
        assert_eq!(b.read(0, 0x48, 2), 0x0005);
    }

    #[test]
    fn a_foreign_state_is_refused() {
        let mut c = ConfigSpace::new(&ID, BARS);
        let mut s = c.save();
        s.bytes[2] = 1;
        assert!(c.check(&s).is_err());
        s = c.save();
        s.bytes[0x10] = 3;
        assert!(c.check(&s).is_err());
        s.bytes.pop();
        assert!(c.check(&s).is_err());
        assert_eq!(c.bytes, c.reset);
        c.set(300, &[1]);
    }
}
