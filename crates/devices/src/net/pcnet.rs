//! AMD Am79C970A PCnet-PCI II Ethernet controller.
//!
//! Data sheet: AMD publication 19436. Sections are cited by the names of registers and of their headings. Frames go to and come from
//! the host's side on channel 0, without frame check sequence; inside of the chip each frame has one.

pub mod registers;

use crate::pci::config::{ConfigSpace, ConfigState, LIMITS};
use hyaline_device::state::{StateError, Value, ensure, from_value, to_value};
use hyaline_device::{Bank, Chip, Cx, Device, IoError, Limits, Ns, Register, Reset};
pub use registers::{BARS, CHIP, ID};
use registers::{BCR_BANK, CONFIG_BANK, CSR_BANK, aprom, bcr, csr, dwio, wio};
use serde::{Deserialize, Serialize};

/// Channel of the frames, both ways.
pub const FRAMES: u32 = 0;

const POLL: u32 = 0;
/// Descriptors looked at in one go; the rest is done one microsecond later.
const BUDGET: u32 = 512;
/// Bytes after which the jabber timer cuts a transmission: 20 ms at 10 Mbit/s.
const JABBER: usize = 25_000;
/// Longest frame taken from the host's side, in bytes.
const LONGEST: usize = 16_384;

// CSR0.
const INIT: u16 = 1;
const STRT: u16 = 1 << 1;
const STOP: u16 = 1 << 2;
const TDMD: u16 = 1 << 3;
const TXON: u16 = 1 << 4;
const RXON: u16 = 1 << 5;
const IENA: u16 = 1 << 6;
const INTR: u16 = 1 << 7;
const IDON: u16 = 1 << 8;
const TINT: u16 = 1 << 9;
const RINT: u16 = 1 << 10;
const MERR: u16 = 1 << 11;
const MISS: u16 = 1 << 12;
const CERR: u16 = 1 << 13;
const BABL: u16 = 1 << 14;
const ERR: u16 = 1 << 15;
// CSR3.
const DXSUFLO: u16 = 1 << 6;
// CSR4.
const JAB: u16 = 1 << 1;
const TXSTRT: u16 = 1 << 3;
const UINT: u16 = 1 << 6;
const UINTCMD: u16 = 1 << 7;
const MFCO: u16 = 1 << 9;
const ASTRP_RCV: u16 = 1 << 10;
const APAD_XMT: u16 = 1 << 11;
const TXDPOLL: u16 = 1 << 12;
// CSR5.
const SPND: u16 = 1;
const MPMODE: u16 = 1 << 1;
const MPINT: u16 = 1 << 4;
const MPPLBA: u16 = 1 << 5;
const SINT: u16 = 1 << 11;
const LTINTEN: u16 = 1 << 14;
const TOKINTD: u16 = 1 << 15;
// CSR15.
const DRX: u16 = 1;
const DTX: u16 = 1 << 1;
const LOOP: u16 = 1 << 2;
const DXMTFCS: u16 = 1 << 3;
const INTL: u16 = 1 << 6;
const DRCVPA: u16 = 1 << 13;
const DRCVBC: u16 = 1 << 14;
const PROM: u16 = 1 << 15;
// BCR18 and the LED registers.
const DWIO: u16 = 1 << 7;
const LNKSE: u16 = 1 << 6;
const LEDDIS: u16 = 1 << 13;
// Upper half of RMD1 and TMD1.
const D_OWN: u16 = 1 << 15;
const D_ERR: u16 = 1 << 14;
const D_CRC: u16 = 1 << 11;
const D_BUFF: u16 = 1 << 10;
const D_STP: u16 = 1 << 9;
const D_ENP: u16 = 1 << 8;
const D_ADD_FCS: u16 = 1 << 13;
const D_LTINT: u16 = 1 << 12;
const D_PAM: u16 = 1 << 6;
const D_LAFM: u16 = 1 << 5;
const D_BAM: u16 = 1 << 4;
// TMD2: bits 15 to 10 of the 16-bit form.
const T_BUFF: u16 = 1 << 15;
const T_UFLO: u16 = 1 << 14;
const T_LCAR: u16 = 1 << 11;

/// CRC-32 of IEEE 802.3, least significant bit first, without the final inversion.
fn crc(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let (mut c, mut k) = (i as u32, 0);
            while k < 8 {
                c = if c & 1 != 0 { c >> 1 ^ 0xedb8_8320 } else { c >> 1 };
                k += 1;
            }
            table[i] = c;
            i += 1;
        }
        table
    };
    bytes.iter().fold(!0, |c, b| c >> 8 ^ TABLE[usize::from(c as u8 ^ b)])
}

/// The frame check sequence as it goes over the wire.
fn fcs(bytes: &[u8]) -> [u8; 4] {
    (!crc(bytes)).to_le_bytes()
}

/// Does the frame end with its own check sequence?
fn checks(wire: &[u8]) -> bool {
    wire.split_last_chunk::<4>().is_some_and(|(data, sum)| fcs(data) == *sum)
}

/// A transfer that did not happen: the condition is in the registers already.
struct Stalled;

/// One descriptor, in the form that all styles have in common.
#[derive(Clone, Copy)]
struct Descriptor {
    address: u32,
    flags: u16,
    /// Lower half of the word that holds the flags.
    low: u16,
    buffer: u32,
    /// Bytes of the buffer, 1 to 4096.
    len: u32,
}

/// Which ring.
#[derive(Clone, Copy, PartialEq)]
enum Ring {
    Receive,
    Transmit,
}

/// The controller's state, without its configuration space.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    mac: [u8; 6],
    aprom: [u8; 16],
    rap: u8,
    csr: Vec<u16>,
    bcr: Vec<u16>,
    link: bool,
    irq: bool,
    poll_at: Option<Ns>,
}

/// What is saved.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    config: ConfigState,
    controller: State,
}

impl State {
    fn new(mac: [u8; 6]) -> State {
        let mut s = State {
            mac,
            aprom: [0; 16],
            rap: 0,
            csr: vec![0; 128],
            bcr: vec![0; 32],
            link: true,
            irq: false,
            poll_at: None,
        };
        s.hard_reset();
        s
    }
    fn check(&self) -> Result<(), StateError> {
        ensure(self.csr.len() == 128 && self.bcr.len() == 32, || {
            format!("{} CSRs and {} BCRs instead of 128 and 32", self.csr.len(), self.bcr.len())
        })?;
        ensure(self.rap < 128, || format!("RAP is {}, above 127", self.rap))?;
        ensure(self.bcr(20) & 0xff < 4, || format!("software style {} does not exist", self.bcr(20) & 0xff))?;
        ensure(self.csr(0) & (ERR | INTR) == 0, || "CSR0 holds bits that are computed".into())
    }

    fn csr(&self, n: usize) -> u16 {
        self.csr.get(n).copied().unwrap_or(0)
    }
    fn set_csr(&mut self, n: usize, value: u16) {
        if let Some(c) = self.csr.get_mut(n) {
            *c = value;
        }
    }
    fn set_bits(&mut self, n: usize, bits: u16) {
        self.set_csr(n, self.csr(n) | bits);
    }
    fn clear_bits(&mut self, n: usize, bits: u16) {
        self.set_csr(n, self.csr(n) & !bits);
    }
    /// A pair of registers that hold an address.
    fn pair(&self, low: usize) -> u32 {
        u32::from(self.csr(low)) | u32::from(self.csr(low + 1)) << 16
    }
    fn set_pair(&mut self, low: usize, value: u32) {
        self.set_csr(low, value as u16);
        self.set_csr(low + 1, (value >> 16) as u16);
    }
    fn bcr(&self, n: usize) -> u16 {
        self.bcr.get(n).copied().unwrap_or(0)
    }
    fn set_bcr(&mut self, n: usize, value: u16) {
        if let Some(b) = self.bcr.get_mut(n) {
            *b = value;
        }
    }
    fn dwio(&self) -> bool {
        self.bcr(18) & DWIO != 0
    }
    fn style(&self) -> u16 {
        self.bcr(20) & 0xff
    }
    /// 32-bit software structures (BCR20, SSIZE32).
    fn wide(&self) -> bool {
        self.style() != 0
    }
    fn mode(&self, bit: u16) -> bool {
        self.csr(15) & bit != 0
    }
    fn suspended(&self) -> bool {
        self.csr(5) & SPND != 0
    }
    /// Registers that belong to the rings can be written now.
    fn idle(&self) -> bool {
        self.csr(0) & STOP != 0 || self.suspended()
    }

    fn hard_reset(&mut self) {
        for r in bcr::BANK.registers {
            self.set_bcr(r.offset as usize, r.reset as u16);
        }
        self.csr.fill(0);
        self.fill_aprom();
        for (i, pair) in
            self.mac.chunks_exact(2).enumerate().map(|(i, p)| (i, [p[0], p[1]])).collect::<Vec<_>>()
        {
            self.set_csr(12 + i, u16::from_le_bytes(pair));
        }
        self.soft_reset();
    }
    /// S_RESET: what the registers' descriptions say of it.
    fn soft_reset(&mut self) {
        self.rap = 0;
        for r in csr::BANK.registers {
            if matches!(r.offset, 0 | 3..=6 | 15 | 46 | 47 | 80..=89 | 92..=124) {
                self.set_csr(r.offset as usize, r.reset as u16);
            }
        }
    }
    /// Setting STOP (CSR0, bit 2).
    fn stop(&mut self) {
        self.set_csr(0, STOP);
        self.clear_bits(4, JAB | TXSTRT | 1 << 5 | UINT | MFCO);
        self.clear_bits(5, SPND | MPINT);
        self.set_csr(112, 0);
        self.set_csr(114, 0);
    }
    fn fill_aprom(&mut self) {
        let m = self.mac;
        let mut a = [m[0], m[1], m[2], m[3], m[4], m[5], 0, 0, 0, 0x11, 0, 0, 0, 0, b'W', b'W'];
        let sum = a.iter().fold(0_u16, |s, b| s.wrapping_add(u16::from(*b)));
        a[12..14].copy_from_slice(&sum.to_le_bytes());
        self.aprom = a;
    }

    /// CSR0 with its computed bits.
    fn csr0(&self) -> u16 {
        let c = self.csr(0);
        let err = if c & (BABL | CERR | MISS | MERR) != 0 { ERR } else { 0 };
        let intr = if self.causes() { INTR } else { 0 };
        c | err | intr
    }
    /// Causes that set INTR: conditions of CSR0 and CSR4 whose masks are off, of CSR5 whose enables are on.
    fn causes(&self) -> bool {
        let zero = self.csr(0) & !self.csr(3) & (BABL | MISS | MERR | RINT | TINT | IDON);
        let four = self.csr(4) & !(self.csr(4) << 1) & (JAB | TXSTRT | 1 << 5 | MFCO) | self.csr(4) & UINT;
        zero != 0 || four != 0 || self.extended(1 << 7 | MPINT | 1 << 9 | SINT)
    }
    /// Conditions of CSR5 whose enable bit, the next lower one, is set.
    fn extended(&self, which: u16) -> bool {
        self.csr(5) & self.csr(5) << 1 & which != 0
    }
    /// INTA#. A system error, sleep and magic packets interrupt whatever IENA says (CSR5).
    fn interrupt(&self) -> bool {
        self.causes() && self.csr(0) & IENA != 0 || self.extended(SINT | 1 << 9 | MPINT)
    }

    /// Descriptors of a ring, 1 to 65,536.
    fn ring_len(&self, ring: Ring) -> u32 {
        negative(self.csr(if ring == Ring::Receive { 76 } else { 78 }))
    }
    /// The current descriptor's number.
    fn ring_index(&self, ring: Ring) -> u32 {
        let left = negative(self.csr(if ring == Ring::Receive { 72 } else { 74 }));
        self.ring_len(ring).saturating_sub(left)
    }
    fn ring_address(&self, ring: Ring, index: u32) -> u32 {
        let base = self.pair(if ring == Ring::Receive { 24 } else { 30 });
        let index = index % self.ring_len(ring);
        base.wrapping_add(index * if self.wide() { 16 } else { 8 })
    }
    fn advance(&mut self, ring: Ring) {
        let len = self.ring_len(ring);
        let next = (self.ring_index(ring) + 1) % len;
        self.set_csr(if ring == Ring::Receive { 72 } else { 74 }, (len - next).wrapping_neg() as u16);
    }

    /// Is the frame for us, and by which filter?
    fn accepts(&self, wire: &[u8]) -> Option<u16> {
        let to = wire.first_chunk::<6>()?;
        let padr = [12, 13, 14].map(|n| self.csr(n).to_le_bytes()).concat();
        if to[0] & 1 == 0 && to[..] == padr[..] && !self.mode(DRCVPA) {
            return Some(D_PAM);
        }
        if *to == [0xff; 6] && !self.mode(DRCVBC) {
            return Some(D_BAM);
        }
        if to[0] & 1 != 0 {
            // The hash is the upper six bits of the check sequence's register (CSR8 to CSR11).
            let bit = (crc(to) >> 26) as usize;
            if self.csr(8 + bit / 16) >> (bit % 16) & 1 != 0 {
                return Some(D_LAFM);
            }
        }
        self.mode(PROM).then_some(0)
    }

    /// Six bytes of ones, then the address sixteen times (CSR5, MPMODE).
    fn is_magic(&self, wire: &[u8]) -> bool {
        let padr = [12, 13, 14].map(|n| self.csr(n).to_le_bytes()).concat();
        let pattern = [vec![0xff; 6], padr.repeat(16)].concat();
        let to_us = self.csr(5) & MPPLBA != 0 || wire.get(..6).is_some_and(|to| to == padr);
        to_us && wire.windows(pattern.len()).any(|w| w == pattern)
    }
}

/// A two's complement number that stands for its negative, 1 to 65,536.
fn negative(value: u16) -> u32 {
    0x1_0000 - u32::from(value)
}

/// The controller.
#[derive(Debug)]
pub struct Pcnet {
    config: ConfigSpace,
    s: State,
}

impl Pcnet {
    /// A controller with the IEEE address `mac`, its link up.
    pub fn new(mac: [u8; 6]) -> Pcnet {
        let mut config = ConfigSpace::new(&ID, BARS);
        // Status: fast back-to-back capable, medium DEVSEL. MIN_GNT and MAX_LAT as BCR22 has them.
        config.define(0x06, &[0x80, 0x02], &[0, 0]);
        config.define(0x3e, &[0x06, 0xff], &[0, 0]);
        Pcnet { config, s: State::new(mac) }
    }
    /// The IEEE address of the address PROM.
    pub fn mac(&self) -> [u8; 6] {
        self.s.mac
    }

    fn update(&mut self, cx: &mut Cx<'_>) {
        let level = self.s.interrupt();
        let level = self.config.intx(level);
        if level != self.s.irq {
            self.s.irq = level;
            cx.line(0).set(level);
        }
    }
    /// Clocks of 33 MHz between polls (CSR47; its low four bits are ignored).
    fn interval(&self) -> Ns {
        u64::from(negative(self.s.csr(47) & !0xf)) * 1000 / 33
    }
    fn arm(&mut self, at: Option<Ns>, cx: &mut Cx<'_>) {
        if self.s.poll_at != at {
            self.s.poll_at = at;
            match at {
                Some(at) => cx.at(POLL, at),
                None => cx.cancel(POLL),
            }
        }
    }
    /// Keeps the poll timer going while there is something to poll for.
    fn schedule(&mut self, cx: &mut Cx<'_>) {
        let polls = self.transmits() && self.s.csr(4) & TXDPOLL == 0;
        match (polls, self.s.poll_at) {
            (true, None) => {
                let at = cx.now() + self.interval();
                self.arm(Some(at), cx);
            }
            (false, Some(_)) => self.arm(None, cx),
            _ => {}
        }
    }
    fn transmits(&self) -> bool {
        self.s.csr(0) & TXON != 0 && !self.s.suspended()
    }

    /// Nobody answered on the bus: the controller stops and says so (CSR5, SINT; PCI status, received master abort).
    fn system_error(&mut self) -> Stalled {
        self.s.stop();
        self.s.set_bits(5, SINT);
        let status = self.config.byte(0x07);
        self.config.set(0x07, &[status | 0x20]);
        Stalled
    }
    fn granted(&mut self) -> Result<(), Stalled> {
        if self.config.bus_master() {
            return Ok(());
        }
        // The bus is never granted: time-out (CSR0, MERR).
        self.s.set_bits(0, MERR);
        Err(Stalled)
    }
    fn fetch(&mut self, address: u32, data: &mut [u8], cx: &mut Cx<'_>) -> Result<(), Stalled> {
        self.granted()?;
        cx.dma_read(u64::from(address), data).map_err(|_| self.system_error())
    }
    fn store(&mut self, address: u32, data: &[u8], cx: &mut Cx<'_>) -> Result<(), Stalled> {
        self.granted()?;
        cx.dma_write(u64::from(address), data).map_err(|_| self.system_error())
    }

    /// Reads a descriptor and notes it in the registers that show it.
    fn descriptor(&mut self, ring: Ring, ahead: u32, cx: &mut Cx<'_>) -> Result<Descriptor, Stalled> {
        let address = self.s.ring_address(ring, self.s.ring_index(ring) + ahead);
        let d = if self.s.wide() {
            let mut raw = [0; 16];
            self.fetch(address, &mut raw, cx)?;
            let word = |i: usize| u32::from_le_bytes([raw[i], raw[i + 1], raw[i + 2], raw[i + 3]]);
            let buffer = if self.s.style() == 3 { word(8) } else { word(0) };
            let one = word(4);
            Descriptor {
                address,
                flags: (one >> 16) as u16,
                low: one as u16,
                buffer,
                len: 4096 - (one & 0xfff),
            }
        } else {
            let mut raw = [0; 8];
            self.fetch(address, &mut raw, cx)?;
            let word = |i: usize| u16::from_le_bytes([raw[i], raw[i + 1]]);
            // The upper 8 bits of all addresses come from CSR2 (CSR2, 16-bit software structures).
            let high = u32::from(self.s.csr(2) >> 8) << 24;
            let buffer = high | u32::from(word(2) & 0xff) << 16 | u32::from(word(0));
            Descriptor {
                address,
                flags: word(2) & 0xff00,
                low: word(2) & 0xff,
                buffer,
                len: 4096 - u32::from(word(4) & 0xfff),
            }
        };
        let (da, ba, bc) = match (ring, ahead) {
            (Ring::Receive, 0) => (28, 18, 40),
            (Ring::Receive, _) => (26, 22, 44),
            (Ring::Transmit, 0) => (34, 20, 42),
            (Ring::Transmit, _) => (32, 64, if ahead == 1 { 66 } else { 62 }),
        };
        self.s.set_pair(da, d.address);
        self.s.set_pair(ba, d.buffer);
        self.s.set_csr(bc, (d.len.wrapping_neg() & 0xffff) as u16);
        self.s.set_csr(bc + 1, d.flags);
        Ok(d)
    }

    /// Gives a descriptor back: first its status, then the word with OWN.
    fn release(&mut self, d: &Descriptor, flags: u16, status: u32, cx: &mut Cx<'_>) -> Result<(), Stalled> {
        if self.s.wide() {
            let at = if self.s.style() == 3 { 0 } else { 8 };
            self.store(d.address.wrapping_add(at), &status.to_le_bytes(), cx)?;
            let one = u32::from(flags) << 16 | u32::from(d.low);
            self.store(d.address.wrapping_add(4), &one.to_le_bytes(), cx)
        } else {
            self.store(d.address.wrapping_add(6), &(status as u16).to_le_bytes(), cx)?;
            self.store(d.address.wrapping_add(2), &(flags & 0xff00 | d.low).to_le_bytes(), cx)
        }
    }
    /// A transmit status where the style has it.
    fn tmd_status(&self, bits: u16) -> u32 {
        if self.s.wide() { u32::from(bits) << 16 } else { u32::from(bits) }
    }

    /// Sends all that the ring offers.
    fn transmit(&mut self, cx: &mut Cx<'_>) {
        self.s.clear_bits(0, TDMD);
        let mut budget = BUDGET;
        while self.transmits() {
            if budget == 0 {
                let at = cx.now() + 1000;
                self.arm(Some(at), cx);
                return;
            }
            match self.transmit_one(&mut budget, cx) {
                Ok(true) => {}
                Ok(false) | Err(Stalled) => break,
            }
        }
        self.schedule(cx);
    }

    /// Sends one frame; false when the controller doesn't own the next descriptor.
    fn transmit_one(&mut self, budget: &mut u32, cx: &mut Cx<'_>) -> Result<bool, Stalled> {
        let mut d = self.descriptor(Ring::Transmit, 0, cx)?;
        if d.flags & D_OWN == 0 {
            return Ok(false);
        }
        *budget = budget.saturating_sub(1);
        if d.flags & D_STP == 0 {
            // In the middle of a frame that broke off: given back unsent.
            self.release(&d, d.flags & !D_OWN, 0, cx)?;
            self.s.advance(Ring::Transmit);
            return Ok(true);
        }
        self.s.set_bits(4, TXSTRT);
        let add_fcs = d.flags & D_ADD_FCS != 0;
        let mut frame = Vec::new();
        let mut chained = 0;
        loop {
            let mut piece = vec![0; d.len as usize];
            self.fetch(d.buffer, &mut piece, cx)?;
            if frame.len() < JABBER {
                frame.extend(piece);
            }
            if d.flags & D_ENP != 0 {
                break;
            }
            let next = self.descriptor(Ring::Transmit, 1, cx)?;
            chained += 1;
            if next.flags & D_OWN == 0 || chained >= BUDGET {
                return self.underflow(&d, cx).map(|()| true);
            }
            self.release(&d, d.flags & !(D_OWN | D_ERR), 0, cx)?;
            self.previous(&d);
            self.s.advance(Ring::Transmit);
            *budget = budget.saturating_sub(1);
            d = next;
        }
        let sent = self.put_on_wire(frame, add_fcs, cx);
        let keep = if self.s.csr(5) & LTINTEN != 0 { D_LTINT } else { 0 };
        let flags = d.flags & !(D_OWN | D_ERR | 0x1c00) | d.flags & keep;
        if sent {
            self.release(&d, flags, 0, cx)?;
        } else {
            let status = self.tmd_status(T_LCAR);
            self.release(&d, flags | D_ERR, status, cx)?;
        }
        self.previous(&d);
        self.s.advance(Ring::Transmit);
        let five = self.s.csr(5);
        let wanted = five & LTINTEN == 0 || d.flags & D_LTINT != 0;
        if !sent || five & TOKINTD == 0 && wanted {
            self.s.set_bits(0, TINT);
        }
        Ok(true)
    }
    fn previous(&mut self, d: &Descriptor) {
        self.s.set_pair(60, d.address);
        self.s.set_csr(62, (d.len.wrapping_neg() & 0xffff) as u16);
        self.s.set_csr(63, d.flags);
    }
    /// The chain ended before the frame did.
    fn underflow(&mut self, d: &Descriptor, cx: &mut Cx<'_>) -> Result<(), Stalled> {
        let status = self.tmd_status(T_BUFF | T_UFLO);
        self.release(d, d.flags & !D_OWN | D_ERR, status, cx)?;
        self.previous(d);
        self.s.advance(Ring::Transmit);
        if self.s.csr(3) & DXSUFLO == 0 {
            self.s.clear_bits(0, TXON);
        }
        self.s.set_bits(0, TINT);
        Ok(())
    }
    /// Pads and checks a frame and lets it go; false if there is no carrier.
    fn put_on_wire(&mut self, mut frame: Vec<u8>, add_fcs: bool, cx: &mut Cx<'_>) -> bool {
        let pads = self.s.csr(4) & APAD_XMT != 0 && frame.len() < 60;
        if pads {
            frame.resize(60, 0);
        }
        if frame.len() >= JABBER {
            frame.truncate(JABBER);
            self.s.set_bits(4, JAB);
        }
        if pads || add_fcs || !self.s.mode(DXMTFCS) {
            let sum = fcs(&frame);
            frame.extend(sum);
        }
        if frame.len() > 1518 {
            self.s.set_bits(0, BABL);
        }
        let looped = self.s.mode(LOOP);
        if !(looped && self.s.mode(INTL)) {
            if !self.s.link {
                self.s.set_bits(0, CERR);
                return false;
            }
            if checks(&frame) {
                cx.send(FRAMES, &frame[..frame.len() - 4]);
            } else {
                cx.note(format_args!(
                    "a frame of {} bytes with a wrong check sequence left; nobody takes it",
                    frame.len()
                ));
            }
        }
        if looped {
            // A stall shows in the registers.
            let _ = self.deliver(&frame, true, cx);
        }
        true
    }

    /// A frame with its check sequence comes in.
    fn deliver(&mut self, wire: &[u8], looped: bool, cx: &mut Cx<'_>) -> Result<(), Stalled> {
        if self.s.suspended()
            && self.s.csr(5) & MPMODE != 0
            && self.s.accepts(wire).is_some()
            && self.s.is_magic(wire)
        {
            self.s.set_bits(5, MPINT);
        }
        if self.s.csr(0) & RXON == 0 || self.s.suspended() {
            return Ok(());
        }
        let runts = looped || self.s.csr(124) & 8 != 0;
        if wire.len() < 64 && !runts {
            return Ok(());
        }
        let Some(mut matched) = self.s.accepts(wire) else { return Ok(()) };
        if self.s.style() < 2 {
            matched = 0;
        }
        let good = checks(wire);
        let data = if good && self.s.csr(4) & ASTRP_RCV != 0 { strip(wire) } else { wire };
        let mut d = self.descriptor(Ring::Receive, 0, cx)?;
        if d.flags & D_OWN == 0 {
            self.miss();
            return Ok(());
        }
        let end = D_ENP | matched | if good { 0 } else { D_ERR | D_CRC };
        let (mut rest, mut start, mut chained) = (data, D_STP, 0);
        loop {
            let (piece, after) = rest.split_at(rest.len().min(d.len as usize));
            self.store(d.buffer, piece, cx)?;
            rest = after;
            let (flags, done) = if rest.is_empty() {
                (start | end, true)
            } else {
                let next = self.descriptor(Ring::Receive, 1, cx)?;
                chained += 1;
                if next.flags & D_OWN == 0 || chained >= BUDGET {
                    (start | D_ERR | D_BUFF, true)
                } else {
                    self.release(&d, start, 0, cx)?;
                    self.s.advance(Ring::Receive);
                    (d, start) = (next, 0);
                    (0, false)
                }
            };
            if done {
                let count = if flags & D_ENP != 0 { data.len() as u32 & 0xfff } else { 0 };
                self.release(&d, flags, count, cx)?;
                self.s.advance(Ring::Receive);
                self.s.set_bits(0, RINT);
                return Ok(());
            }
        }
    }
    fn miss(&mut self) {
        self.s.set_bits(0, MISS);
        let count = self.s.csr(112).wrapping_add(1);
        self.s.set_csr(112, count);
        if count == 0 {
            self.s.set_bits(4, MFCO);
        }
    }

    /// Reads the initialization block (data sheet, "Initialization Block").
    fn initialize(&mut self, cx: &mut Cx<'_>) -> Result<(), Stalled> {
        let address = self.s.pair(1);
        let mut raw = [0_u8; 28];
        let wide = self.s.wide();
        let len = if wide { 28 } else { 24 };
        self.fetch(address, &mut raw[..len], cx)?;
        let word = |i: usize| u16::from_le_bytes([raw[i], raw[i + 1]]);
        let dword = |i: usize| u32::from(word(i)) | u32::from(word(i + 2)) << 16;
        let (mode, padr, ladrf, rlen, tlen, receive, transmit) = if wide {
            (word(0), 4, 12, word(2) >> 4 & 0xf, word(2) >> 12, dword(20), dword(24))
        } else {
            let high = u32::from(self.s.csr(2) >> 8) << 24;
            let ring = |i: usize| high | u32::from(word(i + 2) & 0xff) << 16 | u32::from(word(i));
            (word(0), 2, 8, word(18) >> 13, word(22) >> 13, ring(16), ring(20))
        };
        self.s.set_csr(15, mode);
        for i in 0..3 {
            self.s.set_csr(12 + i, word(padr + 2 * i));
        }
        for i in 0..4 {
            self.s.set_csr(8 + i, word(ladrf + 2 * i));
        }
        self.s.set_csr(6, rlen << 8 | tlen << 12);
        for (ring, length, base, counter, bits) in [(receive, 76, 24, 72, rlen), (transmit, 78, 30, 74, tlen)]
        {
            // At most 512 descriptors.
            let count = (1_u16 << bits.min(9)).wrapping_neg();
            // Descriptors are aligned to their size.
            self.s.set_pair(base, ring & if wide { !0xf } else { !0x7 });
            self.s.set_csr(length, count);
            self.s.set_csr(counter, count);
        }
        self.s.set_bits(0, IDON);
        Ok(())
    }

    fn write_csr0(&mut self, value: u16, cx: &mut Cx<'_>) {
        if value & STOP != 0 {
            self.s.stop();
            return;
        }
        let old = self.s.csr(0);
        self.s.set_csr(0, old & !(value & 0x7f00 | IENA) | value & IENA);
        if value & !old & INIT != 0 {
            self.s.clear_bits(0, STOP);
            self.s.set_bits(0, INIT);
            if self.initialize(cx).is_err() {
                return;
            }
        }
        if value & !old & STRT != 0 {
            self.s.clear_bits(0, STOP);
            self.s.set_bits(0, STRT);
            let on = if self.s.mode(DTX) { 0 } else { TXON } | if self.s.mode(DRX) { 0 } else { RXON };
            self.s.set_bits(0, on);
        }
        if self.transmits() && value & (STRT & !old | TDMD) != 0 {
            self.transmit(cx);
        }
    }

    fn csr_read(&self, n: usize, now: Option<Ns>) -> u16 {
        match n {
            0 => self.s.csr0(),
            16 | 17 => self.s.csr(n - 15),
            46 => {
                let left = self.s.poll_at.zip(now).map_or(0, |(at, now)| at.saturating_sub(now) * 33 / 1000);
                (left.min(0xffff) as u16).wrapping_neg()
            }
            58 => self.s.bcr(20),
            _ => self.s.csr(n),
        }
    }
    fn csr_write(&mut self, n: usize, value: u16, cx: &mut Cx<'_>) {
        let Some(r) = csr::BANK.registers.iter().find(|r| r.offset == n as u64) else {
            cx.guest_error(format_args!("CSR{n} is reserved; the write of {value:#06x} is ignored"));
            return;
        };
        let stopped = self.s.csr(0) & STOP != 0;
        let allowed = match n {
            0 | 3..=5 => true,
            1 | 2 | 16 | 17 => stopped,
            _ => self.s.idle(),
        };
        if !allowed {
            cx.guest_error(format_args!(
                "CSR{n} ({}) can be written only while the controller is stopped or suspended; {value:#06x} is ignored",
                r.name
            ));
            return;
        }
        let stored = r.write(u64::from(self.s.csr(n)), u64::from(value)) as u16;
        match n {
            0 => self.write_csr0(value, cx),
            4 => {
                self.s.set_csr(4, stored | if value & UINTCMD != 0 { UINT } else { 0 });
                self.schedule(cx);
            }
            5 => {
                self.s.set_csr(5, stored);
                if self.transmits() {
                    // Out of suspension: what was queued meanwhile goes at once.
                    self.transmit(cx);
                }
            }
            16 | 17 => self.s.set_csr(n - 15, stored),
            58 => self.bcr_write(20, value, cx),
            76 | 78 => {
                self.s.set_csr(n, stored);
                self.s.set_csr(92, stored.wrapping_neg());
            }
            _ => self.s.set_csr(n, stored),
        }
    }
    fn bcr_read(&self, n: usize) -> u16 {
        let value = self.s.bcr(n);
        let lit = (4..=7).contains(&n) && self.s.link && value & LNKSE != 0 && value & LEDDIS == 0;
        value | u16::from(lit) << 15
    }
    fn bcr_write(&mut self, n: usize, value: u16, cx: &mut Cx<'_>) {
        let Some(r) = bcr::BANK.registers.iter().find(|r| r.offset == n as u64) else {
            cx.guest_error(format_args!("BCR{n} is reserved; the write of {value:#06x} is ignored"));
            return;
        };
        let stored = r.write(u64::from(self.s.bcr(n)), u64::from(value)) as u16;
        match n {
            20 if !self.s.idle() => {
                cx.guest_error("BCR20 can be written only while the controller is stopped or suspended");
            }
            20 => {
                // SSIZE32 and CSRPCNET follow from the style (BCR20, table of software styles).
                let follows = match value & 0xff {
                    0 => 0x0200,
                    1 => 0x0100,
                    2 | 3 => 0x0300,
                    style => {
                        cx.guest_error(format_args!(
                            "software style {style} is reserved; the write is ignored"
                        ));
                        return;
                    }
                };
                self.s.set_bcr(20, stored & !0x0300 | follows);
            }
            22 => {
                self.s.set_bcr(22, stored);
                self.config.set(0x3e, &stored.to_le_bytes());
            }
            _ => self.s.set_bcr(n, stored),
        }
    }

    /// The register at an offset of the window, in the present mode.
    fn at(&self, offset: u64) -> Option<&'static Register> {
        let bank: &'static Bank = match offset {
            0..=15 => &aprom::BANK,
            _ if self.s.dwio() => &dwio::BANK,
            _ => &wio::BANK,
        };
        bank.registers.iter().find(|r| r.covers(offset, 1))
    }
    fn undefined(&self, what: &str, offset: u64, size: u8, cx: &mut Cx<'_>) -> IoError {
        let mode = if self.s.dwio() { "double-word" } else { "word" };
        cx.guest_error(format_args!("{what} of {size} bytes at {offset:#x} is undefined in {mode} I/O mode"));
        IoError::BadSize
    }
    fn window_read(&mut self, offset: u64, size: u8, cx: &mut Cx<'_>) -> Result<u64, IoError> {
        if offset < 16 {
            let bytes = self.s.aprom.iter().skip(offset as usize).take(usize::from(size));
            return Ok(bytes.rev().fold(0, |v, b| v << 8 | u64::from(*b)));
        }
        let register = self.at(offset).filter(|r| r.offset == offset && r.width == size).map(|r| r.name);
        let rap = usize::from(self.s.rap);
        Ok(u64::from(match register {
            Some("RDP") => self.csr_read(rap, Some(cx.now())),
            Some("RAP") => u16::from(self.s.rap),
            Some("BDP") => self.bcr_read(rap),
            Some("RESET") => {
                self.s.stop();
                self.s.soft_reset();
                0
            }
            _ => return Err(self.undefined("a read", offset, size, cx)),
        }))
    }
    fn window_write(&mut self, offset: u64, size: u8, value: u64, cx: &mut Cx<'_>) -> Result<(), IoError> {
        if offset < 16 {
            // Only with APROMWE (BCR2, bit 8).
            if self.s.bcr(2) & 0x100 == 0 {
                return Err(IoError::ReadOnly);
            }
            let place = self.s.aprom.iter_mut().skip(offset as usize).take(usize::from(size));
            place.zip(value.to_le_bytes()).for_each(|(a, v)| *a = v);
            return Ok(());
        }
        if offset == 0x10 && size == 4 && !self.s.dwio() {
            // The way into double-word mode; only a hard reset leads out (BCR18, DWIO).
            self.s.set_bcr(18, self.s.bcr(18) | DWIO);
        }
        let register = self.at(offset).filter(|r| r.offset == offset && r.width == size).map(|r| r.name);
        let rap = usize::from(self.s.rap);
        match register {
            Some("RDP") => self.csr_write(rap, value as u16, cx),
            Some("RAP") => self.s.rap = value as u8 & 0x7f,
            Some("BDP") => self.bcr_write(rap, value as u16, cx),
            // Written by drivers of the NE2100: no effect.
            Some("RESET") => {}
            _ => return Err(self.undefined("a write", offset, size, cx)),
        }
        Ok(())
    }
}

impl Device for Pcnet {
    fn chip(&self) -> &'static Chip {
        &CHIP
    }
    fn limits(&self, bank: usize) -> Limits {
        if bank == CONFIG_BANK { LIMITS } else { Limits::sizes(1, 4) }
    }
    fn register(&self, bank: usize, offset: u64, is_write: bool) -> Option<&'static Register> {
        match bank {
            registers::IO_BANK | registers::MEM_BANK => self.at(offset),
            _ => CHIP.banks.get(bank)?.at(offset, is_write),
        }
    }
    fn peek(&self, bank: usize, register: &Register) -> Option<u64> {
        let n = register.offset as usize;
        match bank {
            CONFIG_BANK => self.config.peek(register),
            CSR_BANK if n == 46 => None,
            CSR_BANK => Some(u64::from(self.csr_read(n, None))),
            BCR_BANK => Some(u64::from(self.bcr_read(n))),
            _ => match register.name {
                "RAP" => Some(u64::from(self.s.rap)),
                "RDP" => Some(u64::from(self.csr_read(usize::from(self.s.rap), None))),
                "BDP" => Some(u64::from(self.bcr_read(usize::from(self.s.rap)))),
                "RESET" => None,
                _ => self.s.aprom.get(n..n + 4)?.first_chunk().map(|b| u64::from(u32::from_le_bytes(*b))),
            },
        }
    }
    fn read(&mut self, bank: usize, offset: u64, size: u8, cx: &mut Cx<'_>) -> Result<u64, IoError> {
        match bank {
            CONFIG_BANK => self.config.read(offset, size),
            registers::IO_BANK | registers::MEM_BANK => {
                let value = self.window_read(offset, size, cx);
                self.schedule(cx);
                self.update(cx);
                value
            }
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
        let done = match bank {
            CONFIG_BANK => self.config.write(offset, size, value, cx).map(|_| ()),
            registers::IO_BANK | registers::MEM_BANK => {
                let done = self.window_write(offset, size, value, cx);
                self.schedule(cx);
                done
            }
            _ => Err(IoError::NotHere),
        };
        self.update(cx);
        done
    }
    fn timer(&mut self, _timer: u32, cx: &mut Cx<'_>) {
        self.s.poll_at = None;
        self.transmit(cx);
        self.update(cx);
    }
    fn input(&mut self, pin: u32, level: bool, cx: &mut Cx<'_>) {
        if pin == 0 && self.s.link != level {
            self.s.link = level;
            cx.note(if level { "link up" } else { "link down" });
        }
    }
    fn receive(&mut self, channel: u32, data: &[u8], cx: &mut Cx<'_>) -> usize {
        let internal = self.s.mode(LOOP) && self.s.mode(INTL);
        let fits = (14..=LONGEST).contains(&data.len());
        if channel == FRAMES && self.s.link && fits && !internal {
            let mut wire = data.to_vec();
            // A wire carries no shorter ones.
            wire.resize(data.len().max(60), 0);
            let sum = fcs(&wire);
            wire.extend(sum);
            // A stall shows in the registers.
            let _ = self.deliver(&wire, false, cx);
            self.schedule(cx);
            self.update(cx);
        }
        data.len()
    }
    fn reset(&mut self, _kind: Reset, cx: &mut Cx<'_>) {
        self.config.reset(cx);
        self.s.hard_reset();
        self.s.stop();
        self.s.irq = false;
        self.s.poll_at = None;
        cx.cancel(POLL);
        cx.line(0).set(false);
    }
    fn save(&self) -> Result<Value, StateError> {
        to_value(&Saved { config: self.config.save(), controller: self.s.clone() })
    }
    fn load(&mut self, state: &Value, cx: &mut Cx<'_>) -> Result<(), StateError> {
        let saved: Saved = from_value(state)?;
        saved.controller.check()?;
        self.config.load(&saved.config, cx)?;
        self.s = saved.controller;
        if let Some(at) = self.s.poll_at {
            cx.at(POLL, at);
        }
        Ok(())
    }
}

/// Without padding and check sequence, if the length field says that there is padding (CSR4, ASTRP_RCV).
fn strip(wire: &[u8]) -> &[u8] {
    let length = wire.get(12..14).map_or(usize::MAX, |l| usize::from(l[0]) << 8 | usize::from(l[1]));
    if length < 46 { wire.get(..14 + length).unwrap_or(wire) } else { wire }
}

#[cfg(test)]
mod tests;
